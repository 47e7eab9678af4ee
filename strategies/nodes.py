"""Which nodes the federation has, and which client each of them is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Protocol, TypeGuard

from flwr.app import ConfigRecord, RecordDict

from fedkd.config import ConfigError
from fedkd.data.splits import same_transfer
from fedkd.rounds import Server
from fedkd.runs.events import MessageCounted
from fedkd.strategies.exchange import DESCRIBE, Exchange
from fedkd.strategies.records import CHALLENGE, WEIGHTS, other_weights, wire_bytes

# The federation's size is believed once it has not changed for this long.
SETTLE_SECONDS = 5.0
MEET_SECONDS = 60.0


class Keys(Protocol):
    """Public keys of the nodes: a node is the client whose key it holds."""

    def challenge(self) -> bytes:
        """What a node is to sign, new for every question."""

    def problem(
        self, facts: Mapping[str, object], challenge: bytes, run: str, node: int
    ) -> str | None:
        """Why `node`, which describes itself by `facts`, is not the client it claims to be."""

    def signed(self, client: int, data: bytes, signature: bytes) -> bool:
        """Whether `signature` of `data` is by the client's key."""


class Nodes:
    """The nodes that take part.

    Args:
        exchange: Asks them.
        server: Of the run.
        keys: Whose key makes a node which client (deployment); None believes what a node claims.
        players: How many nodes play the clients of a large simulation, each the one that it is
            asked to play; None: every client has a node of its own.

    Attributes:
        by_client: Client -> its node.
    """

    def __init__(
        self,
        exchange: Exchange,
        server: Server,
        keys: Keys | None = None,
        *,
        players: int | None = None,
    ) -> None:
        self._exchange = exchange
        self._server = server
        self._keys = keys
        self._clients = server.experiment.clients
        self._options = server.experiment.federation.participation
        self._players = players
        self._unusable: set[int] = set()  # nodes that described themselves so
        self._known: dict[int, int] = {}  # number -> node, as they described themselves
        self.by_client: dict[int, int] = {}

    def wait(self, number: int) -> None:
        """Wait until the federation has the nodes that the run needs to start with round `number`.

        As many as the experiment clients; where clients may come and go, enough that can take part.

        Raises:
            ConfigError: it has another number of nodes, and goes on having it.
        """
        start = self._options.start
        if start is not None and number > 1:  # others may have left for good before it broke off
            start = min(start, self._options.minimum)
        patience = self._server.experiment.federation.wait
        started = changed = time.monotonic()
        count = -1
        while True:
            now = time.monotonic()
            found = len(list(self._exchange.grid.get_node_ids()))
            if found == self._players or (start is None and found == self._clients):
                return
            if start is not None and found >= start:
                self._meet(number)
                if len(self.by_client) >= start:
                    return
            if found != count:
                count, changed = found, now
            settled = found > 0 and now - changed > max(SETTLE_SECONDS, patience)
            if settled or now - started > max(MEET_SECONDS, patience):
                if start is not None:
                    raise ConfigError(
                        f"the run needs {start} clients to start, of {found} nodes in the "
                        f"federation {len(self.by_client)} can take part (run.log has the "
                        "reasons): start more nodes (federation.participation.start)"
                    )
                raise ConfigError(
                    f"the experiment has {self._clients} clients, the federation has {found} "
                    f"nodes: set clients={found} in the config, or start {self._clients} nodes "
                    f"(flwr run . --federation-config 'num-supernodes={self._clients}')"
                )
            self._server.notify("waiting")
            time.sleep(0.1)

    def register(self, number: int) -> None:
        """See who is there, and wait (`federation.wait`) for as many as a round needs.

        Raises:
            ConfigError: no node can take part.
        """
        limit = time.monotonic() + self._server.experiment.federation.wait
        while True:
            met = self._meet(number)
            if met and not self.by_client and self._options.start is None:
                raise ConfigError(
                    "no client of the federation can take part; run.log has the reasons"
                )
            if len(self.by_client) >= self._options.minimum or time.monotonic() >= limit:
                return
            self._server.notify("waiting")
            time.sleep(0.5)

    def _meet(self, number: int) -> bool:
        """Ask nodes not yet known who they are; a restarted node takes its place again.

        Returns:
            Whether there were any.
        """
        online = set(self._exchange.grid.get_node_ids())
        self._known = {c: node for c, node in self._known.items() if node in online}
        self._unusable &= online  # one that was mended and started again is asked again
        unknown = sorted(online - set(self._known.values()) - self._unusable)
        if unknown:
            self._describe(unknown, number)
        self.by_client = self._known
        if self._players is not None and self._known:
            nodes = [node for _, node in sorted(self._known.items())]
            self.by_client = {c: nodes[c % len(nodes)] for c in range(self._clients)}
        return bool(unknown)

    def _describe(self, unknown: list[int], number: int) -> None:
        challenges = {node: self._keys.challenge() for node in unknown} if self._keys else {}
        messages = {}
        for node in unknown:
            content = RecordDict()
            if node in challenges:
                content[CHALLENGE] = ConfigRecord({CHALLENGE: challenges[node]})
            messages[node] = partial(self._exchange.message, node, number, DESCRIBE, content)
        down = wire_bytes(next(iter(messages.values()))())
        for delivery in self._exchange.send(messages):
            node = delivery.client
            up = 0 if delivery.message is None else wire_bytes(delivery.message)
            message = MessageCounted(round=number, phase="describe", down=down, up=up)
            self._server.run.count(message)
            reply = self._exchange.content(delivery, number, DESCRIBE, f"node {node}")
            if reply is None:
                continue
            facts = dict(reply.config_records.get("describe", ConfigRecord()))
            client = facts.get("client")
            problem = self._problem(facts, node, challenges.get(node))
            who = client if self._is_client(client) else None
            if problem is None and who is not None:
                self._known[who] = node
            else:
                if who not in self._known:  # else the other one may go: then it is asked again
                    self._unusable.add(node)
                self._exchange.refuse(number, DESCRIBE, who, f"node {node} {problem}")

    def _problem(
        self, facts: Mapping[str, object], node: int, challenge: bytes | None
    ) -> str | None:
        """Why a node that describes itself so cannot take part, or None if it can."""
        client, partitions = facts.get("client"), facts.get("partitions")
        context = self._server.context
        fingerprint, expected = facts.get("fingerprint"), context.data.fingerprint
        if partitions != (self._players or self._clients) and self._options.start is None:
            return f"is one of {partitions} partitions, the experiment has {self._clients} clients"
        if not self._is_client(client):
            return f"claims to be client {client!r}, clients are 0 to {self._clients - 1}"
        if self._keys is not None:
            run = self._server.run.identity
            forged = self._keys.problem(facts, challenge or b"", run, node)
            if forged is not None:
                return forged
        if client in self._known:
            return f"claims to be client {client}, as node {self._known[client]} does"
        if not same_transfer(str(fingerprint), expected):
            return (
                f"has transfer set {fingerprint!r}, expected {expected!r}: check its data and "
                "its data.root"
            )
        file = self._server.experiment.teachers.model_of(client).options.get("weights")
        if file is not None:
            ours = {str(file): context.weights[str(file)]}
            if (other := other_weights(ours, facts.get(WEIGHTS))) is not None:
                return f"begins with other weights in {other}: copy the server's file to it"
        if facts.get("class_map") != context.class_map:
            return "has other classes than the server"
        return None

    def _is_client(self, client: object) -> TypeGuard[int]:
        """Whether this is the number of a client; True and False, which are integers, are not."""
        return type(client) is int and 0 <= client < self._clients
