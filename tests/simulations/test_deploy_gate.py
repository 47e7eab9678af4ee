"""The gate passes on what a registered node calls, and nothing else."""

import time
from base64 import b64encode
from collections.abc import Iterator

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
)
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient

from fedkd.simulations.deploy import gate
from fedkd.simulations.deploy.gate import CALLS, SERVER, make_gate


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
    sent = PushMessagesRequest(node=Node(node_id=5)).SerializeToString()
    answer = nodes.post(f"/v1/fleet/{call}?a=1", content=sent, headers=headers)
    assert (answer.status_code, answer.content) == (418, b"\x00answer")
    assert answer.headers["flwr-version"] == "1"
    ((method, url, received, body),) = link.seen
    assert (method, url, body) == ("POST", f"https://127.0.0.1:1/v1/fleet/{call}", sent)
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
        url = nodes.base_url.copy_with(raw_path=path.encode())
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


QUESTION = "q" * 64


class Federation:
    """Flower's own SuperLink with two registered nodes, the first of which has a question."""

    def __init__(self) -> None:
        self.app = create_app()
        self.state = self.app.state.linkstate_factory.state()
        self.keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(2)]
        self.public = [public_key_to_bytes(key.public_key()) for key in self.keys]
        self.nodes = [self.state.create_node("a", "b", key, 3600) for key in self.public]
        for node in self.nodes:
            self.state.activate_node(node, 3600)
        self.run = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, None, "serverapp"
        )
        question = make_message(
            metadata=self.metadata(SUPERLINK_NODE_ID, self.nodes[0], "", QUESTION),
            content=RecordDict(),
        )
        assert self.state.store_message_ins(question) == QUESTION

    def metadata(self, source: int, target: int, reply_to: str, identity: str = "") -> Metadata:
        return Metadata(
            run_id=self.run, message_id=identity, src_node_id=source, dst_node_id=target,
            reply_to_message_id=reply_to, group_id="1", created_at=time.time(),
            ttl=60 if reply_to else 600,  # a reply may not outlive its question
            message_type="train",
        )  # fmt: skip

    def push(self, door: TestClient, caller: int, source: int, target: int, reply_to: str) -> int:
        """A message pushed by a node with its own key; the status of the answer."""
        message = make_message(
            metadata=self.metadata(source, target, reply_to), content=RecordDict()
        )
        message.metadata.__dict__["_message_id"] = message.object_id
        request = PushMessagesRequest(
            node=Node(node_id=self.nodes[caller]),
            messages_list=[message_to_proto(message)],
            message_object_trees=[get_object_tree(message)],
        )
        at = now().isoformat()
        headers = {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public[caller]).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(
                sign_message(self.keys[caller], at.encode())
            ).decode(),
            TIMESTAMP_HEADER: at,
            "content-type": PROTOBUF_MEDIA_TYPE,
        }
        body = request.SerializeToString()
        return door.post("/v1/fleet/push-messages", content=body, headers=headers).status_code

    @property
    def stored(self) -> tuple[int, int]:
        """Questions and replies that the SuperLink holds."""
        return len(self.state.message_ins_store), len(self.state.message_res_store)


def test_a_node_speaks_for_itself_and_to_the_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that knows the id of another node and of the question to it.

    Flower compares the caller with its key, not with the sender of the messages: without the
    gate both forgeries are stored.
    """
    monkeypatch.setattr(fleet_handlers, "check_abort", lambda *_: None)  # the run is not started
    assert SERVER == SUPERLINK_NODE_ID
    one = Federation()
    victim, attacker = one.nodes
    with (
        TestClient(one.app) as superlink,
        TestClient(make_gate("http://testserver", httpx.ASGITransport(one.app))) as door,
    ):
        assert one.push(door, 1, victim, SERVER, QUESTION) == 403
        assert one.push(door, 1, SERVER, victim, "") == 403
        assert one.push(door, 1, attacker, victim, "") == 403
        assert one.push(door, 1, attacker, SERVER, "") == 403
        assert one.stored == (1, 0)
        assert one.push(door, 1, attacker, SERVER, QUESTION) == 200  # as any reply to no question:
        assert one.stored == (1, 0)  # dropped
        assert one.push(door, 0, victim, SERVER, QUESTION) == 200
        assert one.stored == (1, 1)
        assert one.push(superlink, 1, SERVER, victim, "") == 200  # why there is a gate
        assert one.stored == (2, 1)


def test_messages_that_cannot_be_read_stay_outside(link: SuperLink, nodes: TestClient) -> None:
    assert nodes.post("/v1/fleet/push-messages", content=b"\xff\xff").status_code == 403
    assert link.seen == []
