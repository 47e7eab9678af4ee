"""Clients of a simulation that train together: one message for several of one architecture.

A group's message goes to the node of its first member and names all of them; its reply holds the
records of each, or its error. On both ends a client is what it is alone: the reply is taken apart
before anything is counted or read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from heapq import heapreplace
from traceback import format_exception

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedkd.strategies.messaging import Delivery
from fedkd.strategies.records import JOB, MEMBERS
from fedkd.strategies.workers import CLIENT_APP_RAISED

_OUTCOME = "outcome"  # in a group's reply: how it went


def balanced(
    clients: Sequence[int],
    architecture: Callable[[int], Hashable],
    cost: Callable[[int], float],
    workers: int,
) -> list[list[int]]:
    """Groups of clients of one architecture, of much the same cost, the costliest first.

    Args:
        clients: Whom to group.
        architecture: What the networks of a group have in common.
        cost: Of a client's training, in any unit.
        workers: How many groups are worked on at once. Each architecture has at least its share of
            them in groups, so that none waits.
    """
    kinds: dict[Hashable, list[int]] = {}
    for client in sorted(clients, key=lambda client: (-cost(client), client)):
        kinds.setdefault(architecture(client), []).append(client)
    total = sum(map(cost, clients))
    groups: list[tuple[float, list[int]]] = []
    for members in kinds.values():
        share = sum(map(cost, members)) / total if total > 0 else 1 / len(kinds)
        count = min(math.ceil(round(workers * share, 6)), len(members))
        # A heap of (cost so far, members so far, number).
        loads: list[tuple[float, int, int]] = [(0, 0, n) for n in range(max(count, 1))]
        parts: list[list[int]] = [[] for _ in loads]
        for client in members:
            spent, size, part = loads[0]
            heapreplace(loads, (spent + cost(client), size + 1, part))
            parts[part].append(client)
        groups += [(-spent, sorted(parts[part])) for spent, _, part in loads]
    return [group for _, group in sorted(groups)]


def members(message: Message) -> list[int]:
    """Whose work a message asks for; empty if it is the node's own."""
    return [int(client) for client in message.content.config_records[JOB].get(MEMBERS, [])]  # type: ignore[union-attr]


def joined(results: Mapping[int, RecordDict | Exception]) -> RecordDict:
    """The reply of a group: each client's records, or the error that it raised."""
    content = RecordDict()
    for client, result in results.items():
        error = ""
        if isinstance(result, Exception):
            error = "".join(format_exception(result))
        else:
            content.update({f"{client}/{name}": record for name, record in result.items()})
        content[f"{client}/{_OUTCOME}"] = ConfigRecord({"error": error})
    return content


def taken_apart(delivery: Delivery, clients: Sequence[int]) -> Iterator[Delivery]:
    """What came back from each client of a group."""
    message = delivery.message
    if message is None or message.has_error() or len(clients) == 1:
        yield from (Delivery(client, message, delivery.seconds) for client in clients)
        return
    found: dict[str, RecordDict] = {}
    for name, record in message.content.items():
        who, _, own = name.partition("/")
        found.setdefault(who, RecordDict())[own] = record
    for client in clients:
        records = found.get(str(client), RecordDict())
        outcome = records.pop(_OUTCOME, None)
        error = "no outcome in the group's reply" if outcome is None else str(outcome["error"])
        reply: RecordDict | Error = Error(CLIENT_APP_RAISED, error) if error else records
        yield Delivery(client, Message(reply, reply_to=message), delivery.seconds)
