"""Messages out, replies in as they arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

# Replies wait in memory until they are pulled, so only this many are ever under way.
WINDOW = 64
# A reply that expires is announced by Flower itself; this is how long we wait for that.
GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Delivery:
    """What came back from a client; `message` is None if nothing came in time."""

    client: int
    message: Message | None
    seconds: float


def exchanged(
    grid: Grid,
    messages: Mapping[int, Callable[[], Message]],
    *,
    deadline: float,
    window: int = WINDOW,
) -> Iterator[Delivery | None]:
    """Send one message per client and yield each reply as soon as it is there.

    Every client yields exactly one delivery. Messages are made when they are sent, so that a
    client's time to live starts then. Nothing waits: None is yielded once the first messages are
    sent, before a reply is read, and whenever nothing has arrived.

    Args:
        grid: Flower's way to the nodes.
        messages: Client -> maker of its message.
        deadline: Seconds after which a client is given up.
        window: Messages under way at once.
    """
    waiting = list(messages.items())[::-1]
    under_way: dict[str, tuple[int, float]] = {}
    begun = False
    while waiting or under_way:
        unsent: list[int] = []
        while waiting and len(under_way) < window:
            client, make = waiting.pop()
            # HttpGrid iterates twice: always hand it a list.
            sent = [identity for identity in grid.push_messages([make()]) if identity]
            if sent:
                under_way[sent[0]] = (client, time.monotonic())
            else:
                unsent.append(client)
        if not begun:
            begun = True
            yield None
        yield from (Delivery(client, None, 0.0) for client in unsent)
        arrived = False
        for identity, (client, started) in list(under_way.items()):
            # One id at a time: pulling many inflates every ready reply into memory at once.
            for message in grid.pull_messages([identity]):
                del under_way[identity]
                arrived = True
                yield Delivery(client, message, time.monotonic() - started)
            if identity in under_way and time.monotonic() - started > deadline + GRACE_SECONDS:
                del under_way[identity]
                yield Delivery(client, None, time.monotonic() - started)
        if under_way and not arrived:
            yield None
