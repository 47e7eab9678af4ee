"""The gate passes on what a registered node calls, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient

from simulations.deploy import gate
from simulations.deploy.gate import CALLS, make_gate


class SuperLink:
    """Answers everything and remembers what arrived."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.app = Starlette()
        self.app.add_route("/{path:path}", self.answer, methods=["GET", "POST", "PUT"])

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.seen.append((request.method, str(request.url), dict(request.headers), body))
        return Response(b"\x00answer", 418, {"flwr-version": "1", "content-type": "x/y"})


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def nodes(link: SuperLink) -> Iterator[TestClient]:
    app = make_gate("https://127.0.0.1:1", httpx.ASGITransport(link.app))
    with TestClient(app, base_url="https://fedkd.example.org:8443") as client:
        yield client


def test_what_a_node_calls_is_one_of_flowers_calls_and_not_registering() -> None:
    known = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    ours = {f"/v1/fleet/{call}" for call in CALLS}
    assert known - ours == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert ours <= known


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_a_node_arrives_as_it_was_sent(
    link: SuperLink, nodes: TestClient, call: str
) -> None:
    headers = {"flwr-public-key": "abc", "flwr-signature": "def", "content-type": "x/protobuf"}
    answer = nodes.post(f"/v1/fleet/{call}?a=1", content=b"\x00\x01body", headers=headers)
    assert (answer.status_code, answer.content) == (418, b"\x00answer")
    assert answer.headers["flwr-version"] == "1"
    ((method, url, received, body),) = link.seen
    assert (method, url, body) == ("POST", f"https://127.0.0.1:1/v1/fleet/{call}", b"\x00\x01body")
    assert headers.items() <= received.items()
    assert received["host"] == "127.0.0.1:1"


def test_nothing_else_reaches_the_superlink(link: SuperLink, nodes: TestClient) -> None:
    others = [path for _, path in PROTOBUF_REQUEST_TYPES if path[10:] not in CALLS]
    assert sum(path.startswith("/v1/control/") for path in others) > 10
    tricks = [
        "/", "/docs", "/openapi.json", "/health", "/v1/fleet", "/v1/fleet/", "/v1/fleet/get-run/",
        "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run/../../control/start-run", "//v1/control/start-run",
        "/v1/fleet/get-run%2f..%2f..%2fcontrol%2fstart-run", "/V1/fleet/get-run",
        "/v1/fleet/get-run;/v1/control/start-run", "/v1/fleet/get-run%00", "/v1/fleet\\get-run",
    ]  # fmt: skip
    for path in [*others, *tricks]:
        # As bytes on the wire: the client must not tidy up the path.
        url = httpx.URL("https://fedkd.example.org:8443").copy_with(raw_path=path.encode())
        assert nodes.send(nodes.build_request("POST", url)).status_code == 404, path
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        assert nodes.request(method, "/v1/fleet/get-run").status_code == 404
    assert link.seen == []


def test_a_body_without_end_is_cut_off(
    link: SuperLink, nodes: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_BODY", 1000)

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    for content in (b"x" * 1001, pieces()):
        assert nodes.post("/v1/fleet/push-object", content=content).status_code == 413
    assert link.seen == []
    assert nodes.post("/v1/fleet/push-object", content=b"x" * 1000).status_code == 418


def test_a_superlink_that_is_down_is_a_502() -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no")

    with TestClient(make_gate("https://127.0.0.1:1", httpx.MockTransport(down))) as client:
        assert client.post("/v1/fleet/get-run").status_code == 502
