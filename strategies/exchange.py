"""The messages of a run: made, sent, counted and read.

Whatever goes wrong with a client (an error, a late reply, a reply that must not be used) is
recorded with the reason and costs that client its round; it never ends the run.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkd.build import data_root
from fedkd.io.text import plain
from fedkd.knowledge.query import Images, Refused
from fedkd.rounds import Server
from fedkd.runs.events import MessageCounted, PhaseName, ReplyRefused
from fedkd.runs.quarantine import strike
from fedkd.strategies.groups import balanced, taken_apart
from fedkd.strategies.messaging import Delivery, exchanged
from fedkd.strategies.records import (
    JOB,
    MEMBERS,
    NAMED,
    UNKNOWN,
    WEIGHTS,
    Number,
    check_length,
    explain,
    job_digest,
    read_numbers,
    read_replies,
    wire_bytes,
)
from fedkd.strategies.workers import actor_died, restarting, worker_lost

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# A real node that was killed and started again is let in when its heartbeat has been missed.
REJOIN_SECONDS = 60.0
# Ray starts a dead worker again meanwhile; only then is anybody asked more than twice.
RETRIES, RESTART_SECONDS = 5, 2.0

Arrived = TypeVar("Arrived")

Messages = Mapping[int, Callable[[], Message]]
"""Makers of messages, by client (by node, until it is known which client that is)."""


@dataclass(frozen=True)
class Phase:
    """One exchange of a round.

    Attributes:
        name: In the ledger.
        message_type: Flower's.
        knowledge: Whether replies hold arrays of knowledge.
    """

    name: PhaseName
    message_type: str
    knowledge: bool = False


DESCRIBE = Phase("describe", "query.describe")
TRAIN = Phase("train", "train")
KNOWLEDGE = Phase("knowledge", "query.knowledge", knowledge=True)
EVALUATE = Phase("evaluate", "evaluate", knowledge=True)


@dataclass(frozen=True)
class Answered:
    """A reply that holds records; whether they can be used is not known yet."""

    client: int
    records: RecordDict
    seconds: float


class Exchange:
    """Messages to the nodes of a run, and their replies.

    Args:
        grid: Flower's way to the nodes.
        server: Of the run.
        state_dir: Where clients on this host may keep their teachers (simulation); None leaves
            them to use their own (deployment).
        workers: How many clients, or groups of them, a simulation works on at once; asked in the
            round's first phase, when the workers are up.
        named: Whether every message names its client, since nodes play many.
    """

    def __init__(
        self,
        grid: Grid,
        server: Server,
        *,
        state_dir: str | None = None,
        workers: Callable[[], int] = lambda: 1,
        named: bool = False,
    ) -> None:
        self.grid = grid
        self._names_clients = named
        self._workers = workers
        self._server = server
        self._run = server.run
        self._federation = server.experiment.federation
        #: Whether clients are processes of this machine, none of which is late.
        self.simulated = state_dir is not None
        self._max_bytes = self._federation.max_payload_mb * 2**20
        context = server.context
        self._job: dict[str, str | bytes] = {
            "config": context.sent,
            "run": server.run.identity,
            "state": state_dir or "",
            "fingerprint": context.data.fingerprint,
        }
        if context.weights:
            self._job[WEIGHTS] = json.dumps(context.weights, sort_keys=True)
        # A run that is gone on with from another working directory: its images are where they
        # were. Nodes with a state folder of their own know better (simulations/client_app.py).
        if self.simulated and context.root != data_root(server.experiment):
            self._job["data-root"] = str(context.root)
        self._named = {NAMED: job_digest(self._job)}
        #: Clients whose reply to a message is still to come.
        self.awaited: set[int] = set()
        self._holders: set[int] = set()  # nodes that have kept the job: they are sent its digest

    def message(
        self,
        node: int,
        number: int,
        phase: Phase,
        content: RecordDict,
        client: int | None = None,
        group: Sequence[int] = (),
    ) -> Message:
        """One message: its records and the job, of the node's client or of a group.

        A node that has kept the job is sent its digest; one that is asked who it is may have been
        started anew.
        """
        known = node in self._holders and phase is not DESCRIBE
        run = self._named if known else self._job
        job = ConfigRecord({**run, "round": number})
        if len(group) > 1 or (group and self._names_clients):
            job[MEMBERS] = list(group)
        if phase is KNOWLEDGE and client is not None:
            base = self._server.base(client, number)
            if base > 0:
                job["base"] = base
        return Message(
            RecordDict({**content, JOB: job}),
            dst_node_id=node,
            message_type=phase.message_type,
            ttl=self._federation.deadline,
            group_id=str(number),
        )

    def ask(
        self, number: int, phase: Phase, nodes: Mapping[int, int], content: RecordDict
    ) -> Iterator[Answered]:
        """Send the same records to clients; yield replies as they arrive.

        Raises:
            RuntimeError: every worker process died.
        """
        return self._waited_for(self.asked(number, phase, nodes, content))

    def asked(
        self, number: int, phase: Phase, nodes: Mapping[int, int], content: RecordDict
    ) -> Iterator[Answered | None]:
        """The same without waiting: None once messages are sent, and whenever nothing arrived."""
        for delivery in self._deliver(number, phase, nodes, content):
            records = None if delivery is None else self.content(delivery, number, phase)
            if delivery is None:
                yield None
            elif records is not None:
                yield Answered(delivery.client, records, round(delivery.seconds, 3))

    def rest(self) -> None:
        """Wait a moment for replies."""
        self._server.notify("waiting")
        time.sleep(POLL_SECONDS)

    def _deliver(
        self, number: int, phase: Phase, nodes: Mapping[int, int], content: RecordDict
    ) -> Iterator[Delivery | None]:
        """Send, count and announce what `ask` reads; None as `asked` gives it.

        Who answers through a worker that went down is asked again: that is not the client's fault,
        and what it finished before is in its files and not done again. So is a node that was
        started anew and no longer knows the job.
        """
        if not nodes:
            return
        self._server.notify("phase", round=number, phase=phase.name, total=len(nodes))
        waiting = sorted(nodes)
        sizes: dict[bool, int] = {}  # a phase sends the same to everybody, but for the job
        for attempt in range(RETRIES + 1):
            lost: list[Delivery] = []
            forgot: list[int] = []
            held = {client: nodes[client] in self._holders for client in waiting}
            for client in waiting:  # members of a group count what they would get alone
                if held[client] not in sizes:
                    example = self.message(nodes[client], number, phase, content, client)
                    sizes[held[client]] = wire_bytes(example)
            groups = {group[0]: group for group in self._groups(phase, waiting)}
            messages: Messages = {
                client: partial(self.message, nodes[client], number, phase, content, client, group)
                for client, group in groups.items()
            }
            self.awaited.update(waiting)
            for sent in exchanged(self.grid, messages, deadline=self._federation.deadline):
                if sent is None:
                    yield None
                    continue
                node, group = nodes[sent.client], groups[sent.client]
                if attempt < RETRIES and held[sent.client] and _asks_for_the_job(sent.message):
                    self._count(number, phase, sizes[True], sent)
                    self._holders.discard(node)
                    forgot += group
                    continue
                self._note_holder(node, sent.message)
                for delivery in taken_apart(sent, group):
                    client = delivery.client
                    self._count(number, phase, sizes[held[client]], delivery)
                    if self._is_lost(delivery.message, attempt):
                        lost.append(delivery)
                        continue
                    self._server.notify("reply", round=number, phase=phase.name, client=client)
                    self.awaited.discard(client)
                    yield delivery
            if lost:
                if attempt == 0:
                    self._check_alive(number, phase, lost, len(groups))
                else:
                    time.sleep(RESTART_SECONDS)
                self._await({nodes[delivery.client] for delivery in lost})
            waiting = sorted([*forgot, *(delivery.client for delivery in lost)])
            if not waiting:
                return

    def send(self, messages: Messages) -> Iterator[Delivery]:
        """Send messages; yield what comes back, each once."""
        deadline = self._federation.deadline
        return self._waited_for(exchanged(self.grid, messages, deadline=deadline))

    def _waited_for(self, arriving: Iterator[Arrived | None]) -> Iterator[Arrived]:
        """The same, resting whenever nothing has arrived."""
        next(arriving, None)  # the messages are sent
        for arrived in arriving:
            if arrived is None:
                self.rest()
            else:
                yield arrived

    def _groups(self, phase: Phase, clients: Sequence[int]) -> list[list[int]]:
        """Who is asked by one message: everybody alone, but for clients that train together."""
        experiment, context = self._server.experiment, self._server.context
        if not (experiment.resources.clients_together and phase is TRAIN and self.simulated):
            return [[client] for client in clients]
        return balanced(clients, context.architecture, context.cost, self._workers())

    def _is_lost(self, message: Message | None, attempt: int) -> bool:
        """Whether to ask again: any lost worker once, one that Ray restarts until it is up."""
        if attempt == 0:
            return worker_lost(message, simulated=self.simulated)
        return attempt < RETRIES and restarting(message, simulated=self.simulated)

    def _check_alive(self, number: int, phase: Phase, lost: list[Delivery], asked: int) -> None:
        messages = {id(each.message): each.message for each in lost}  # members share their group's
        dead = sum(actor_died(each, simulated=self.simulated) for each in messages.values())
        if dead > 1 and dead >= asked:
            raise RuntimeError(
                f"every worker process died in round {number} ({phase.name}); out of memory? "
                f"Lower the number of clients at once (resources.client_cpus), then go on with: "
                f"fedkd run --resume {self._run.path}"
            )

    def _await(self, nodes: set[int]) -> None:
        """Give real nodes that went down (`federation.wait`) the time to come back."""
        limit = time.monotonic() + min(self._federation.wait, REJOIN_SECONDS)
        while time.monotonic() < limit and not nodes <= set(self.grid.get_node_ids()):
            self._server.notify("waiting")
            time.sleep(0.5)

    def _count(self, number: int, phase: Phase, down: int, delivery: Delivery) -> None:
        up = wire_bytes(delivery.message) if delivery.message is not None else 0
        self._run.count(
            MessageCounted(
                round=number,
                phase=phase.name,
                client=delivery.client,
                down=down,
                up=up,
                seconds=round(delivery.seconds, 3),
                time=round(time.time(), 1),
            )
        )

    def _note_holder(self, node: int, message: Message | None) -> None:
        """Remember that a node keeps the job: it keeps what was sent before it answers."""
        if message is not None and not message.has_error():
            self._holders.add(node)

    def content(
        self, delivery: Delivery, number: int, phase: Phase, who: str | None = None
    ) -> RecordDict | None:
        """The reply's records, or None after recording why there are none."""
        who = who or f"client {delivery.client}"
        client = None if phase is DESCRIBE else delivery.client
        message = delivery.message
        if message is None:
            self.refuse(number, phase, client, f"{who} did not answer within the deadline")
            return None
        if message.has_error():
            reason = message.error.reason or ""
            # Its end matters most; a client chooses how long it is.
            logger.warning("%s, round %d, %s:\n%s", who, number, phase.name, reason[-2000:])
            self.refuse(number, phase, client, f"{explain(reason)} (code {message.error.code})")
            return None
        try:
            check_length(message, self._max_bytes if phase.knowledge else 0.0)
        except Refused as refusal:
            self.refuse(number, phase, client, str(refusal))
            return None
        if phase is DESCRIBE:
            self._note_holder(delivery.client, message)
        return message.content

    def numbers(
        self,
        answer: Answered,
        number: int,
        phase: Phase,
        allowed: Mapping[str, Number],
        required: Collection[str],
    ) -> dict[str, float | int] | None:
        """A reply's numbers, or None after recording why they are not used."""
        try:
            return read_numbers(answer.records, allowed, required)
        except Refused as refusal:
            self.refuse(number, phase, answer.client, str(refusal))
            return None

    def accept(self, answer: Answered, number: int, phase: Phase, asked: Sequence[Images]) -> bool:
        """Hand a reply's answers to the server; False after recording why they are refused."""
        try:
            if asked:
                replies = read_replies(answer.records, self._max_bytes)
                self._server.accept(answer.client, number, asked, replies)
        except Refused as refusal:
            self.refuse(number, phase, answer.client, str(refusal))
            if phase is KNOWLEDGE and self._federation.quarantine.after is not None:
                strike(self._run, number, answer.client, str(refusal))
            return False
        return True

    def refuse(self, number: int, phase: Phase, client: int | None, reason: str) -> None:
        """Record why a client, or what it sent, takes no part."""
        event = ReplyRefused(round=number, phase=phase.name, client=client, reason=plain(reason))
        self._run.record(event)
        self._server.notify("refused", **asdict(event))


def _asks_for_the_job(message: Message | None) -> bool:
    """Whether a node that was sent the digest of the job answers that it does not know it."""
    return message is not None and not message.has_error() and UNKNOWN in message.content
