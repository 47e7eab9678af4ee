"""Whether a reply means that a worker process or its machine went down, not what a client did."""

from __future__ import annotations

from flwr.app import Message

# flwr.common.constant.ErrorCode, which is not public.
UNKNOWN, CLIENT_APP_RAISED, NODE_UNAVAILABLE, CLIENT_APP_CRASHED = 0, 2, 5, 8


def worker_lost(message: Message | None, *, simulated: bool) -> bool:
    """Whether the node or its worker went down.

    Args:
        message: The reply; None if nothing came in time.
        simulated: Whether workers are Ray's. A real node writes its replies itself, so nothing in
            them is taken for Flower's.
    """
    if message is None or not message.has_error():
        return False
    lost = message.error.code in (NODE_UNAVAILABLE, CLIENT_APP_CRASHED)
    return lost or actor_died(message, simulated=simulated)


def actor_died(message: Message | None, *, simulated: bool) -> bool:
    """Whether Flower reports that a Ray worker died, or is not up again yet.

    What a client app raises has a code of its own, so no client can claim it.
    """
    reason = _reason(message)
    died = "ActorDied" in reason or "ActorUnavailable" in reason
    return simulated and died and message is not None and message.error.code == UNKNOWN


def restarting(message: Message | None, *, simulated: bool) -> bool:
    """Whether Flower reports that a Ray worker is not up again yet."""
    return actor_died(message, simulated=simulated) and "Unavailable" in _reason(message)


def _reason(message: Message | None) -> str:
    return "" if message is None or not message.has_error() else message.error.reason or ""
