"""Many teachers -> one student on the server, as a Flower strategy.

Per round: train -> query knowledge -> fuse -> distil -> evaluate. Whatever goes wrong with a
client (an error, a late reply, a payload that must not be used) costs that client its round and
is written down with the reason; it never ends the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedkd.build import data_root
from fedkd.config import ConfigError
from fedkd.io.text import plain
from fedkd.knowledge.query import Images, Refused
from fedkd.rounds import Server, Stopwatch
from fedkd.runs.events import (
    ClientEvaluated,
    ClientTrained,
    MessageCounted,
    PhaseName,
    ReplyRefused,
)
from fedkd.runs.privacy_statement import write_statement
from fedkd.runs.quarantine import distrusted, quarantined, strike
from strategies.messaging import Reply, send_and_receive
from strategies.records import (
    CHALLENGE,
    JOB,
    STUDENT,
    Number,
    check_length,
    explain,
    read_numbers,
    read_replies,
    wire_bytes,
)

logger = logging.getLogger(__name__)

# The federation's size is believed once it has not changed for this long.
SETTLE_SECONDS = 5.0
MEET_SECONDS = 60.0
# A real node that was killed and started again is let in when its heartbeat has been missed.
REJOIN_SECONDS = 60.0
# Ray starts a dead worker again meanwhile; only then is anybody asked more than twice.
RETRIES, RESTART_SECONDS = 5, 2.0


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


# What is read from replies; anything else in them is refused.
TRAINED = {"loss": Number(0, 1e30), "accuracy": Number(0, 1)}
TRAINED_PRIVATELY = {"epsilon": Number(0, 1e9), "trained": Number(0, 1)}
JUDGED = {
    "holdout_right": Number(0, 2**40, whole=True),
    "holdout_total": Number(0, 2**40, whole=True),
}


class Keys(Protocol):
    """Public keys of the nodes: a node is the client whose key it holds."""

    def challenge(self) -> bytes:
        """What a node is to sign, new for every question."""

    def problem(
        self, facts: Mapping[str, Any], challenge: bytes, run: str, node: int
    ) -> str | None:
        """Why `node`, which describes itself by `facts`, is not the client it claims to be."""


class FederatedDistillation(Strategy):
    """Flower strategy around a `fedkd.rounds.Server`.

    Args:
        server: Accepts, fuses, distils and remembers.
        state_dir: Where clients on this host may keep their teachers (simulation); None tells
            them to use their own (deployment).
        keys: Whose key makes a node which client (deployment); None: a node's word is taken.
    """

    def __init__(
        self, server: Server, *, state_dir: str | None = None, keys: Keys | None = None
    ) -> None:
        self.server = server
        self.experiment = server.experiment
        self.config = server.workspace.sent
        self.run = server.run
        self.notify = server.notify
        self.state_dir = state_dir
        self.keys = keys
        # A run that is gone on with from another working directory: its images are where they
        # were. Nodes with a state folder of their own know better (simulations/client_app.py).
        root = server.workspace.root
        elsewhere = state_dir is not None and root != data_root(self.experiment)
        self.data_root = str(root) if elsewhere else None
        self.nodes: dict[int, int] = {}  # client -> node id
        self._strangers: set[int] = set()  # nodes that described themselves as unusable

    # -- the loop --------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left (all, or those after the last checkpoint).

        The arguments exist for Flower's interface; rounds, deadlines and evaluation come from
        the experiment.

        Raises:
            ConfigError: the federation has another number of nodes than the experiment clients.
        """
        result = Result()
        self.summary()
        self.server.recover()
        self._wait_for_nodes(grid)
        for number in range(self.server.round + 1, (num_rounds or self.experiment.rounds) + 1):
            self._register_nodes(grid, number)
            self._round(grid, number, result)
        result.arrays = ArrayRecord(self.server.student.state_dict())
        return result

    def _round(self, grid: Grid, number: int, result: Result) -> None:
        watch = Stopwatch()
        self.notify("round_start", round=number, rounds=self.experiment.rounds)
        empty, no_config = ArrayRecord(), ConfigRecord()
        with watch.measure("train"):
            replies = self._send(grid, number, TRAIN, self.configure_train, empty, no_config)
            _, trained = self.aggregate_train(number, replies)
        if trained is not None:
            result.train_metrics_clientapp[number] = trained
        with watch.measure("knowledge"):
            replies = self._send(grid, number, KNOWLEDGE, self.configure_query, empty, no_config)
            self.aggregate_query(number, replies)
        ready = self.server.has_quorum(number)
        fused = None
        if ready:
            self.notify("phase", round=number, phase="distil")
            with watch.measure("fuse"):
                fused = self.server.fuse(number)
            if (limit := self.experiment.federation.quarantine).after is not None:
                for client in distrusted(fused, limit.trust):
                    strike(self.run, number, client, "the fusion rules gave it no say")
            with watch.measure("distil"):
                self.server.learn(number, fused)
        with watch.measure("evaluate"):
            replies = self._send(grid, number, EVALUATE, self.configure_evaluate, empty, no_config)
            evaluated = self.aggregate_evaluate(number, replies)
            scores = self.server.evaluate(number, fused)
        if evaluated is not None:
            result.evaluate_metrics_clientapp[number] = evaluated
        result.evaluate_metrics_serverapp[number] = MetricRecord(
            {"accuracy": scores["student"].accuracy}
        )
        self.server.finish_round(
            number,
            status="ok" if ready else "degraded",
            answered=self.server.answered(number),
            seconds=watch.seconds,
            **scores,
        )

    def summary(self) -> None:
        """Log what this strategy is about to do."""
        terms = ", ".join(f"{t.weight:g} x {t.name}" for t in self.experiment.distillation.losses)
        rules = " -> ".join(rule.name for rule in self.experiment.fusion)
        logger.info(
            "%d clients, %d rounds, fusion %s, objective %s",
            self.experiment.clients, self.experiment.rounds, rules, terms,
        )  # fmt: skip

    # -- who is there ----------------------------------------------------------------------

    def _wait_for_nodes(self, grid: Grid) -> None:
        """Wait until the federation has the experiment's number of nodes, or refuse the run."""
        wanted = self.experiment.clients
        started = changed = time.monotonic()
        count = -1
        while True:
            now = time.monotonic()
            found = len(list(grid.get_node_ids()))
            if found == wanted:
                return
            if found != count:
                count, changed = found, now
            patience = self.experiment.federation.wait
            settled = found > 0 and now - changed > max(SETTLE_SECONDS, patience)
            if settled or now - started > max(MEET_SECONDS, patience):
                raise ConfigError(
                    f"the experiment has {wanted} clients, the federation has {found} nodes: set "
                    f"clients={found} in the config, or start {wanted} nodes "
                    f"(flwr run . --federation-config 'num-supernodes={wanted}')"
                )
            self.notify("waiting")
            time.sleep(0.1)

    def _register_nodes(self, grid: Grid, number: int) -> None:
        """Ask nodes not yet known who they are; a restarted node takes its place again."""
        online = set(grid.get_node_ids())
        self.nodes = {client: node for client, node in self.nodes.items() if node in online}
        self._strangers &= online  # one that was mended and started again is asked again
        unknown = sorted(online - set(self.nodes.values()) - self._strangers)
        if not unknown:
            return
        challenges = {node: self.keys.challenge() for node in unknown} if self.keys else {}
        messages = {}
        for node in unknown:
            question = RecordDict()
            if node in challenges:
                question[CHALLENGE] = ConfigRecord({CHALLENGE: challenges[node]})
            messages[node] = partial(self._message, node, number, DESCRIBE, question)
        down = wire_bytes(next(iter(messages.values()))())
        for reply in self._send_and_receive(grid, messages):
            node = reply.client
            up = 0 if reply.message is None else wire_bytes(reply.message)
            self.run.count(MessageCounted(round=number, phase="describe", down=down, up=up))
            content = self._content(reply, number, DESCRIBE, f"node {node}")
            if content is None:
                continue
            facts = dict(content.config_records.get("describe", ConfigRecord()))
            client = facts.get("client")
            problem = self._problem(facts, node, challenges.get(node))
            if problem is None and isinstance(client, int):
                self.nodes[client] = node
            else:
                self._strangers.add(node)
                who = client if isinstance(client, int) else None
                self._refuse(number, DESCRIBE, who, f"node {node} {problem}")
        if not self.nodes:
            raise ConfigError("no client of the federation can take part; run.log has the reasons")

    def _problem(self, facts: dict[str, Any], node: int, challenge: bytes | None) -> str | None:
        """Why a node that describes itself so cannot take part, or None if it can."""
        client, partitions = facts.get("client"), facts.get("partitions")
        fingerprint = facts.get("fingerprint")
        expected = self.server.workspace.data.transfer.fingerprint
        if partitions != self.experiment.clients:
            return (
                f"is one of {partitions} partitions, the experiment has "
                f"{self.experiment.clients} clients"
            )
        if type(client) is not int or not 0 <= client < self.experiment.clients:
            return f"claims to be client {client!r}"
        if self.keys is not None:
            signed = challenge or b""
            forged = self.keys.problem(facts, signed, self.run.identity, node)
            if forged is not None:
                return forged
        if client in self.nodes:
            return f"claims to be client {client}, as node {self.nodes[client]} does"
        if fingerprint != expected:
            return (
                f"has transfer set {fingerprint!r}, expected {expected!r}: check its data and "
                "its data.root"
            )
        if facts.get("class_map") != self.server.workspace.class_map:
            return "has other classes than the server"
        return None

    # -- the phases ------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask who is not in quarantine to train; the student goes along if clients use it."""
        content = RecordDict()
        if self.experiment.teachers.feedback.use != "none" and server_round > 1:
            content[STUDENT] = self._student()
        out = quarantined(self.run, self.experiment.federation.quarantine)
        for client, reason in out.items():
            self._refuse(server_round, TRAIN, client, reason)
        asked = {client: node for client, node in self.nodes.items() if client not in out}
        return self._messages(server_round, TRAIN, content, asked)

    def aggregate_train(  # type: ignore[override]
        self, server_round: int, replies: Iterable[Reply]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Write down what each client's training gave; remember who may be asked."""
        self._trained: list[int] = []
        for reply in replies:
            content = self._content(reply, server_round, TRAIN)
            facts = self._numbers(reply, server_round, TRAIN, content, *self._training_numbers())
            if facts is None:
                continue
            self._trained.append(reply.client)
            seconds = round(reply.seconds, 3)
            self.run.record(
                ClientTrained(
                    round=server_round,
                    client=reply.client,
                    seconds=seconds,
                    loss=facts.get("loss"),
                    accuracy=facts.get("accuracy"),
                    epsilon=facts.get("epsilon"),
                    trained=facts.get("trained"),
                )
            )
            if facts.get("trained") == 0:
                self.server.warn(
                    f"round {server_round}: the privacy budget of client {reply.client} is spent; "
                    "its teacher stays as it is and goes on answering"
                )
        write_statement(self.run)
        return None, MetricRecord({"clients": len(self._trained)})

    def configure_query(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the clients that trained, less those whose knowledge is held already."""
        held = set(self.server.answered(server_round))
        asked = {c: self.nodes[c] for c in self._trained if c in self.nodes and c not in held}
        return self._messages(server_round, KNOWLEDGE, RecordDict(), asked)

    def aggregate_query(self, server_round: int, replies: Iterable[Reply]) -> MetricRecord | None:
        """Check each payload as it arrives and spill it to disk."""
        for reply in replies:
            self._accept(reply, server_round, KNOWLEDGE, self.server.workspace.learning_images)
        return MetricRecord({"clients": len(self.server.answered(server_round))})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for the teachers' test answers; at the end also judge the student privately."""
        options = self.experiment.evaluation
        judge = options.clients and server_round == self.experiment.rounds
        if not options.teachers and not judge:
            return []
        content = RecordDict()
        if judge:
            content[STUDENT] = self._student()
        asked = {c: self.nodes[c] for c in self._trained if c in self.nodes}
        return self._messages(server_round, EVALUATE, content, asked)

    def aggregate_evaluate(  # type: ignore[override]
        self, server_round: int, replies: Iterable[Reply]
    ) -> MetricRecord | None:
        """Keep the teachers' test answers and the clients' verdicts on the student."""
        right = total = 0
        options = self.experiment.evaluation
        judges = options.clients and server_round == self.experiment.rounds
        for reply in replies:
            content = (
                self._accept(reply, server_round, EVALUATE, (Images.TEST,))
                if options.teachers
                else self._content(reply, server_round, EVALUATE)
            )
            allowed = JUDGED if judges else {}
            facts = self._numbers(reply, server_round, EVALUATE, content, allowed, allowed)
            if facts and facts["holdout_right"] > facts["holdout_total"]:
                reason = "holdout_right: more than holdout_total"
                self._refuse(server_round, EVALUATE, reply.client, reason)
            elif facts and facts["holdout_total"]:
                right += int(facts["holdout_right"])
                total += int(facts["holdout_total"])
                seconds = round(reply.seconds, 3)
                self.run.record(
                    ClientEvaluated(
                        round=server_round,
                        client=reply.client,
                        seconds=seconds,
                        holdout_right=facts["holdout_right"],
                        holdout_total=facts["holdout_total"],
                    )
                )
        return MetricRecord({"accuracy": right / total, "examples": total}) if total else None

    # -- messages --------------------------------------------------------------------------

    def _messages(
        self, number: int, phase: Phase, content: RecordDict, nodes: dict[int, int]
    ) -> Iterable[Message]:
        """One message per client; kept by client in `_pending`, since Flower's are anonymous."""
        self._pending: dict[int, Callable[[], Message]] = {
            client: partial(self._message, node, number, phase, content, client)
            for client, node in sorted(nodes.items())
        }
        return (make() for make in self._pending.values())

    def _message(
        self,
        node: int,
        number: int,
        phase: Phase,
        content: RecordDict,
        client: int | None = None,
    ) -> Message:
        filled = RecordDict(dict(content))
        job: dict[str, Any] = {
            "config": self.config,
            "run": self.run.identity,
            "round": number,
            "state": self.state_dir or "",
            "fingerprint": self.server.workspace.data.transfer.fingerprint,
        }
        if self.data_root is not None:
            job["data-root"] = self.data_root
        if phase is KNOWLEDGE and client is not None:
            held = self.server.held(client, number)
            if held > 0:
                job["held"] = held
        filled[JOB] = ConfigRecord(job)
        return Message(
            filled,
            dst_node_id=node,
            message_type=phase.message_type,
            ttl=self.experiment.federation.deadline,
            group_id=str(number),
        )

    def _send(
        self,
        grid: Grid,
        number: int,
        phase: Phase,
        configure: Callable[..., Iterable[Message]],
        arrays: ArrayRecord,
        config: ConfigRecord,
    ) -> Iterable[Reply]:
        """Send a phase's messages; yield replies as they arrive, lost workers asked once more."""
        first = next(iter(configure(number, arrays, config, grid)), None)
        if first is None:
            return
        messages = dict(self._pending)
        self.notify("phase", round=number, phase=phase.name, total=len(messages))
        down = wire_bytes(first)  # a phase says the same to everybody
        lost: list[Reply] = []
        for reply in self._send_and_receive(grid, messages):
            self._count(number, phase, down, reply)
            if self._worker_lost(reply.message):
                lost.append(reply)
                continue
            self.notify("reply", round=number, phase=phase.name, client=reply.client)
            yield reply
        dead = sum(self._actor_died(reply.message) for reply in lost)
        if dead > 1 and dead >= len(messages):
            raise RuntimeError(
                f"every worker process died in round {number} ({phase.name}); out of memory? "
                f"Lower the number of clients at once (resources.client_cpus), then go on with: "
                f"fedkd run --resume {self.run.path}"
            )
        for attempt in range(1, RETRIES + 1):
            if not lost:
                return
            # The worker or its machine went down (out of memory, usually), not the client's fault:
            # once more. What it finished before is in its files and not done again.
            self._await(grid, {self.nodes[reply.client] for reply in lost})
            again = {reply.client: messages[reply.client] for reply in lost}
            lost = []
            for reply in self._send_and_receive(grid, again):
                self._count(number, phase, down, reply)
                if attempt < RETRIES and self._restarting(reply.message):
                    lost.append(reply)
                    continue
                self.notify("reply", round=number, phase=phase.name, client=reply.client)
                yield reply
            if lost:
                time.sleep(RESTART_SECONDS)

    def _await(self, grid: Grid, nodes: set[int]) -> None:
        """Give real nodes that went down (`federation.wait`) the time to come back."""
        limit = time.monotonic() + min(self.experiment.federation.wait, REJOIN_SECONDS)
        while time.monotonic() < limit and not nodes <= set(grid.get_node_ids()):
            self.notify("waiting")
            time.sleep(0.5)

    def _send_and_receive(
        self, grid: Grid, messages: Mapping[int, Callable[[], Message]]
    ) -> Iterator[Reply]:
        return send_and_receive(
            grid,
            messages,
            deadline=self.experiment.federation.deadline,
            on_poll=lambda: self.notify("waiting"),
        )

    def _count(self, number: int, phase: Phase, down: int, reply: Reply) -> None:
        up = wire_bytes(reply.message) if reply.message is not None else 0
        self.run.count(
            MessageCounted(
                round=number,
                phase=phase.name,
                client=reply.client,
                down=down,
                up=up,
                seconds=round(reply.seconds, 3),
                time=round(time.time(), 1),
            )
        )

    def _content(
        self, reply: Reply, number: int, phase: Phase, who: str | None = None
    ) -> RecordDict | None:
        """The reply's content, or None after writing down why there is none."""
        who = who or f"client {reply.client}"
        client = None if phase is DESCRIBE else reply.client
        if reply.message is None:
            self._refuse(number, phase, client, f"{who} did not answer within the deadline")
        elif reply.message.has_error():
            error = reply.message.error
            reason = error.reason or ""
            # The end of it tells most; a client chooses how long it is.
            logger.warning("%s, round %d, %s:\n%s", who, number, phase.name, reason[-2000:])
            self._refuse(number, phase, client, f"{explain(reason)} (code {error.code})")
        else:
            try:
                check_length(reply.message, self._max_bytes if phase.knowledge else 0.0)
            except Refused as refusal:
                self._refuse(number, phase, client, str(refusal))
                return None
            return reply.message.content
        return None

    @property
    def _max_bytes(self) -> float:
        return self.experiment.federation.max_payload_mb * 2**20

    def _training_numbers(self) -> tuple[Mapping[str, Number], Collection[str]]:
        """What a reply about training may say, and what it has to."""
        if self.experiment.teachers.privacy is not None:
            return TRAINED_PRIVATELY, TRAINED_PRIVATELY
        return ({}, ()) if self.experiment.release is not None else (TRAINED, ())

    def _numbers(
        self,
        reply: Reply,
        number: int,
        phase: Phase,
        content: RecordDict | None,
        allowed: Mapping[str, Number],
        required: Collection[str],
    ) -> dict[str, float | int] | None:
        """A reply's numbers, or None after writing down why they are not used."""
        if content is None:
            return None
        try:
            return read_numbers(content, allowed, required)
        except Refused as refusal:
            self._refuse(number, phase, reply.client, str(refusal))
            return None

    def _accept(
        self, reply: Reply, number: int, phase: Phase, asked: Sequence[Images]
    ) -> RecordDict | None:
        content = self._content(reply, number, phase)
        if content is None:
            return None
        try:
            replies = read_replies(content, self._max_bytes)
            self.server.accept(reply.client, number, asked, replies)
        except Refused as refusal:
            self._refuse(number, phase, reply.client, str(refusal))
            if phase is KNOWLEDGE and self.experiment.federation.quarantine.after is not None:
                strike(self.run, number, reply.client, str(refusal))
            return None
        return content

    def _refuse(self, number: int, phase: Phase, client: int | None, reason: str) -> None:
        reason = plain(reason)
        event = ReplyRefused(round=number, phase=phase.name, client=client, reason=reason)
        self.run.record(event)
        self.notify("refused", **asdict(event))

    def _student(self) -> ArrayRecord:
        weights: dict[str, Any] = {
            name: tensor.cpu() for name, tensor in self.server.student.state_dict().items()
        }
        return ArrayRecord(weights)

    def _worker_lost(self, message: Message | None) -> bool:
        if message is None or not message.has_error():
            return False
        lost = message.error.code in (NODE_UNAVAILABLE, CLIENT_APP_CRASHED)
        return lost or self._actor_died(message)

    def _actor_died(self, message: Message | None) -> bool:
        """Whether Flower says that a Ray worker died: in a simulation, and not in a client's name.

        What a client app raises has a code of its own; a real node writes its replies itself.
        """
        if self.state_dir is None or message is None or not message.has_error():
            return False
        reason = message.error.reason or ""
        died = "ActorDied" in reason or "ActorUnavailable" in reason
        return died and message.error.code == UNKNOWN

    def _restarting(self, message: Message | None) -> bool:
        """Whether Flower says that a Ray worker is not up again yet."""
        died = self._actor_died(message)
        return died and message is not None and "Unavailable" in (message.error.reason or "")


# flwr.common.constant.ErrorCode, which is not public.
UNKNOWN, NODE_UNAVAILABLE, CLIENT_APP_CRASHED = 0, 5, 8
