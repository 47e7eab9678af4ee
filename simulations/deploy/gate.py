"""The door that nodes come in by: it passes on what a node needs, and nothing else.

Flower's SuperLink serves nodes (Fleet), the command line (Control) and the server's own processes
(Runtime) on one port, and asks nobody for a credential on the second and third. So it listens on
the loopback of its machine, and this gate listens where nodes can reach it: TLS with the same
certificate, the exact paths of the Fleet API that a registered node calls, 404 for all others.

The SuperLink checks that a call bears the key of the node it names, but not that the messages in
it are that node's: who knew another's id could answer for it, or ask it as the server does. The
gate lets a node send only replies in its own name, to the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from flwr.proto.fleet_pb2 import PushMessagesRequest

from fedkd.io.extras import extra

with extra("deploy", "fedkd.simulations.deploy"):
    import httpx
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

logger = logging.getLogger(__name__)

# Registering is missing: the operator registers keys, by Control.
CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
# Flower cuts arrays into pieces of 5 MiB, and looks who is calling only after it has read all.
MAX_BODY = 64 * 2**20
# flwr.common.constant.SUPERLINK_NODE_ID, which is not public.
SERVER = 1
SECONDS = 60.0
# Headers of one hop, or made anew by the next one.
_HOP = {
    "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate",
    "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip


class _Forged(Exception):
    """Messages that are not the sender's own replies."""


class _TooLong(Exception):
    """A body of more than `MAX_BODY` bytes."""


def make_gate(superlink: str, transport: httpx.AsyncBaseTransport) -> Starlette:
    """The gate as an ASGI app."""
    client = httpx.AsyncClient(base_url=superlink, transport=transport, timeout=SECONDS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def forward(request: Request) -> Response:
        try:
            body = await _body(request)
            if request.url.path.endswith("/push-messages"):
                _check_sender(body)
            # The path is one of ours, so no trick in it reaches the SuperLink; a query is dropped.
            answer = await client.post(
                request.url.path, headers=_passed(request.headers), content=body
            )
        except _TooLong:
            return PlainTextResponse("the body is too long\n", 413)
        except _Forged as error:
            whose = request.client.host if request.client else "nobody"
            logger.warning("refused messages from %s: %s", whose, error)
            return PlainTextResponse(f"{error}\n", 403)
        except ClientDisconnect:
            return PlainTextResponse("the node is gone\n", 400)
        except httpx.HTTPError as error:
            logger.warning("the SuperLink does not answer: %s", type(error).__name__)
            return PlainTextResponse("the SuperLink does not answer\n", 502)
        headers = _passed(answer.headers)
        headers.pop("content-encoding", None)  # httpx has decoded it
        return Response(answer.content, answer.status_code, headers)

    async def refuse(request: Request, error: Exception) -> Response:
        whose = request.client.host if request.client else "nobody"
        logger.warning("refused %s %.200r from %s", request.method, request.url.path, whose)
        return PlainTextResponse("not for nodes\n", 404)

    routes = [Route(f"/v1/fleet/{call}", forward, methods=["POST"]) for call in CALLS]
    gate = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={404: refuse, 405: refuse}
    )
    gate.router.redirect_slashes = False
    return gate


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP}


def _check_sender(body: bytes) -> None:
    """Raise `_Forged` unless all messages are replies of the node that pushes them."""
    try:
        pushed = PushMessagesRequest.FromString(body)
    except Exception:  # protobuf's own, whatever makes the bytes unreadable
        raise _Forged("no messages that can be read") from None
    for message in pushed.messages_list:
        sent = message.metadata
        if sent.src_node_id != pushed.node.node_id:
            raise _Forged("a message in the name of another node")
        if sent.dst_node_id != SERVER or not sent.reply_to_message_id:
            raise _Forged("a message that is no reply to the server")


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise _TooLong
    return bytes(body)


def serve(folder: Path, host: str, port: int, superlink_port: int) -> None:
    """Serve the gate with the certificate in `folder`, as long as the SuperLink lives.

    `superlink.sh` starts it beside the SuperLink, whose process is its parent: it ends with it, and
    if it ends first (its port is taken) it ends the SuperLink, lest nodes wait in front of nothing.
    """
    parent = os.getppid()
    trusted = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    everybody = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    transport = httpx.AsyncHTTPTransport(verify=trusted, limits=everybody, trust_env=False)
    server = uvicorn.Server(
        uvicorn.Config(
            make_gate(f"https://127.0.0.1:{superlink_port}", transport),
            host=host,
            port=port,
            ssl_certfile=str(folder / "server.crt"),
            ssl_keyfile=str(folder / "server.key"),
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=5,
            log_level="warning",
        )
    )

    async def run() -> None:
        watch = asyncio.create_task(_end_with(parent, server))
        await server.serve()
        watch.cancel()

    try:
        asyncio.run(run())
    finally:
        if os.getppid() == parent:
            os.kill(parent, signal.SIGTERM)


async def _end_with(parent: int, server: uvicorn.Server) -> None:
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    server.should_exit = True
