"""The two messages of a secure sum, and the sum: keys out, keys round, masked votes in.

A client that gave its key and no votes leaves its masks in everybody else's numbers. Then the
others are asked again, with fresh keys and fresh noise, as often as the promise has paid for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict

from fedkd.knowledge.query import Refused
from fedkd.privacy.masking import KEY_BYTES
from fedkd.privacy.release.cells import Cells
from fedkd.rounds import Server
from fedkd.rounds.secure_sum import Roster, Signed, key_statement
from fedkd.strategies.exchange import Answered, Exchange, Phase

KEYS = Phase("keys", "query.keys")
MASKED = Phase("masked", "query.masked", knowledge=True)

RECORD = "sum"
_LONGEST_SIGNATURE = 256


def secure_sum(
    exchange: Exchange,
    server: Server,
    round_number: int,
    nodes: Mapping[int, int],
    signed: Signed | None,
) -> None:
    """Let clients sum their votes of a round, if enough of them can.

    Args:
        exchange: Asks them.
        server: Of the run.
        round_number: From 1.
        nodes: Client -> node, of those that trained.
        signed: Whether (client, data, signature) fit; None where nobody signs.
    """
    if server.answered(round_number):  # before the server was started again
        return
    least = server.context.round_sum.least
    alive = dict(nodes)
    while True:
        if server.repeats_left(round_number) < 1:
            server.warn(
                f"round {round_number}: no sum, and all that the promise pays for are used up "
                "(release.secure.repeats)"
            )
            return
        attempt = server.attempts(round_number) + 1
        keys, signatures = _keys(exchange, server, round_number, attempt, alive, signed)
        if len(keys) < least:
            server.warn(
                f"round {round_number}: {len(keys)} clients can sum, at least {least} are needed "
                "(release.secure.missing): nobody's votes are asked for"
            )
            return
        server.attempt(round_number, attempt, keys)
        roster = Roster(attempt, keys, signatures, server.context.transfer_cells)
        asked = {client: alive[client] for client in keys}
        values = _votes(exchange, server, round_number, asked, roster)
        if len(values) == len(keys):
            server.accept_sum(round_number, values)
            return
        alive = {client: alive[client] for client in values}


def _keys(
    exchange: Exchange,
    server: Server,
    round_number: int,
    attempt: int,
    nodes: Mapping[int, int],
    signed: Signed | None,
) -> tuple[dict[int, bytes], dict[int, bytes]]:
    keys: dict[int, bytes] = {}
    signatures: dict[int, bytes] = {}
    content = RecordDict({RECORD: ConfigRecord({"attempt": attempt})})
    for reply in exchange.ask(round_number, KEYS, nodes, content):
        try:
            key, signature = _read_key(reply)
            statement = key_statement(server.run.identity, round_number, attempt, reply.client, key)
            if signed is not None and not signed(reply.client, statement, signature):
                raise Refused("its key for the sum is not signed with its node's key")
            if key in keys.values():
                raise Refused("its key for the sum is another client's")
        except Refused as refusal:
            exchange.refuse(round_number, KEYS, reply.client, str(refusal))
            continue
        keys[reply.client] = key
        if signed is not None:
            signatures[reply.client] = signature
    return keys, signatures


def _read_key(reply: Answered) -> tuple[bytes, bytes]:
    record = reply.records.config_records.get(RECORD, ConfigRecord())
    key, signature = record.get("key"), record.get("signature", b"")
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise Refused(f"no key of {KEY_BYTES} bytes for the sum")
    if not isinstance(signature, bytes) or len(signature) > _LONGEST_SIGNATURE:
        raise Refused("no signature under its key for the sum")
    return key, signature


def _votes(
    exchange: Exchange,
    server: Server,
    round_number: int,
    nodes: Mapping[int, int],
    roster: Roster,
) -> dict[int, np.ndarray]:
    size = server.context.round_sum.size
    values: dict[int, np.ndarray] = {}
    content = RecordDict({RECORD: roster_record(roster)})
    for reply in exchange.ask(round_number, MASKED, nodes, content):
        sent = reply.records.config_records.get(RECORD, ConfigRecord()).get("values")
        if not isinstance(sent, bytes) or len(sent) != 4 * size:
            got = f"{len(sent)} bytes" if isinstance(sent, bytes) else "none"
            reason = f"masked votes: expected {4 * size} bytes, got {got}"
            exchange.refuse(round_number, MASKED, reply.client, reason)
        else:
            values[reply.client] = np.frombuffer(sent, "<u4").astype(np.uint32)
    return values


def roster_record(roster: Roster) -> ConfigRecord:
    """A roster as it travels."""
    clients = sorted(roster.keys)
    record = ConfigRecord(
        {
            "attempt": roster.attempt,
            "clients": clients,
            "keys": b"".join(roster.keys[client] for client in clients),
        }
    )
    if roster.signatures:
        record["signatures"] = [roster.signatures[client] for client in clients]
    if roster.cells is not None:
        record["cells"] = roster.cells.of.numpy().astype("<u2").tobytes()
    return record


def read_roster(content: RecordDict) -> Roster:
    """The roster in a message. Raises `Refused`."""
    record = content.config_records.get(RECORD, ConfigRecord())
    attempt, clients = record.get("attempt"), record.get("clients")
    keys, signatures = record.get("keys"), record.get("signatures", [])
    cells = record.get("cells")
    if (
        not isinstance(attempt, int)
        or not isinstance(clients, list)
        or not isinstance(keys, bytes)
        or len(keys) != KEY_BYTES * len(clients)
        or not isinstance(signatures, list)
        or len(signatures) not in (0, len(clients))
        or not isinstance(cells, bytes | None)
    ):
        raise Refused("no roster of a secure sum in the message")
    numbers = [int(client) for client in clients]
    if len(set(numbers)) < len(numbers):
        raise Refused("a client is in the sum twice")
    parts = [keys[n : n + KEY_BYTES] for n in range(0, len(keys), KEY_BYTES)]
    return Roster(
        attempt,
        dict(zip(numbers, parts, strict=True)),
        dict(zip(numbers, map(bytes, signatures))),  # type: ignore[arg-type]
        None if not cells else Cells(torch.from_numpy(np.frombuffer(cells, "<u2").astype(int))),
    )
