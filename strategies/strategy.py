"""Many teachers -> one student on the server, over Flower's messages.

A driver of `fedkd.rounds.Server`, not a subclass of Flower's `Strategy`: see docs/design.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedkd.rounds import Server
from fedkd.rounds.client_files import TeacherCache
from fedkd.runs.events import ClientEvaluated, ClientTrained
from fedkd.runs.privacy_statement import write_statement
from fedkd.runs.quarantine import quarantined
from fedkd.strategies.exchange import EVALUATE, KNOWLEDGE, TRAIN, Answered, Exchange
from fedkd.strategies.nodes import Keys, Nodes
from fedkd.strategies.records import STUDENT, Number
from fedkd.strategies.secure_sum import secure_sum

logger = logging.getLogger(__name__)

# What is read from replies; anything else in them is refused.
TRAINED = {"loss": Number(0, 1e30), "accuracy": Number(0, 1)}
TRAINED_PRIVATELY = {"epsilon": Number(0, 1e9), "trained": Number(0, 1)}
JUDGED = {
    "holdout_right": Number(0, 2**40, whole=True),
    "holdout_total": Number(0, 2**40, whole=True),
}
DETECTED = {name: Number(0, 1) for name in ("balanced_accuracy", "auc", "sensitivity")}


class FederatedDistillation:
    """The rounds of a run with the nodes of a Flower federation.

    Args:
        grid: Flower's way to the nodes.
        server: Accepts, fuses, distils and records.
        state_dir: Where clients on this host may keep their teachers (simulation); None leaves
            them to use their own (deployment).
        keys: Whose key makes a node which client (deployment); None believes what a node claims.
        workers: How many clients, or groups of them, a simulation works on at once.
        players: How many nodes play the clients of a large simulation; see `Nodes`.
    """

    def __init__(
        self,
        grid: Grid,
        server: Server,
        *,
        state_dir: str | None = None,
        keys: Keys | None = None,
        workers: Callable[[], int] = lambda: 1,
        players: int | None = None,
    ) -> None:
        self._server = server
        self._experiment = server.experiment
        self._buffered = server.experiment.federation.mode == "buffered"
        self.exchange = Exchange(
            grid, server, state_dir=state_dir, workers=workers, named=players is not None
        )
        self.nodes = Nodes(self.exchange, server, keys, players=players)
        self._signed = None if keys is None else keys.signed
        self._asked: list[int] = []  # clients that were asked to train in this round
        self._trained: list[int] = []  # those that did
        self._late: list[tuple[int, int]] = []  # round, client: who trained for an earlier one
        self._open: dict[int, Iterator[Answered | None]] = {}  # replies still to come, by round
        self._teachers: TeacherCache | None = None
        # What was paid for with privacy is not thrown away.
        if state_dir is not None and server.experiment.teachers.privacy is None:
            limit = server.experiment.resources.teachers_gb * 1e9
            self._teachers = TeacherCache(Path(state_dir), limit, server.round)

    def run(self) -> None:
        """Run the rounds that are left: all, or those after the last checkpoint.

        Raises:
            ConfigError: the federation has another number of nodes than the experiment clients.
        """
        experiment = self._experiment
        logger.info(
            "%d clients, %d rounds, fusion %s, objective %s",
            experiment.clients,
            experiment.rounds,
            " -> ".join(rule.name for rule in experiment.fusion),
            ", ".join(f"{term.weight:g} x {term.name}" for term in experiment.distillation.losses),
        )
        self._server.recover()
        self._make_room(self._server.round)
        self.nodes.wait(self._server.round + 1)
        while not self._server.is_over:
            number = self._server.round + 1
            self.nodes.register(number)
            self._server.run_round(number, self)
            self._make_room(number)

    def _make_room(self, round_number: int) -> None:
        """Remove teachers of a simulation that take more disk than they may."""
        gone: list[int] = []
        if self._teachers is not None:
            late = [client for _, client in self._late]
            busy = self.exchange.awaited if self._buffered else set()
            gone = self._teachers.trim(round_number, [*self._asked, *late], busy)
        if gone:
            logger.info("round %d: teachers of %d clients were removed", round_number, len(gone))
            limit = self._experiment.resources.teachers_gb
            self._server.warn(
                f"teachers take more than resources.teachers_gb={limit:g}: those of clients asked "
                "longest ago are removed, and such a client begins anew when it is asked again"
            )

    def train(self, round_number: int) -> None:
        """Ask the round's cohort to train; the student goes along if clients use it.

        Who is in quarantine is not in it. With spares, the round goes on when as many as it wants
        have trained. A simulation, where nobody is late, lets all of them train and takes the first
        of the draw, so that the student does not depend on which process was quick.
        """
        content = RecordDict()
        if self._experiment.teachers.feedback.use != "none" and round_number > 1:
            content[STUDENT] = _record(self._server.student.state_dict())
        out = quarantined(self._server.run, self._experiment.federation.quarantine)
        for client, reason in out.items():
            self.exchange.refuse(round_number, TRAIN, client, reason)
        nodes = self.nodes.by_client
        busy = self.exchange.awaited if self._buffered else set()
        cohort = self._server.draw(round_number, nodes.keys() - out.keys() - busy)
        wanted = self._server.wanted(round_number)
        asked = {client: nodes[client] for client in cohort if client in nodes}
        self._asked, self._trained, self._late = list(asked), [], []
        keep = self._experiment.federation.stale.keep
        replies = self.exchange.asked(round_number, TRAIN, asked, content)
        next(replies, None)  # sent before late replies are read, which may be enough for the round
        self._open[round_number] = replies
        for number, reply in self._replies():
            facts = self.exchange.numbers(reply, number, TRAIN, *self._training_numbers())
            if facts is None:
                continue
            if number == round_number:
                self._trained.append(reply.client)
            elif number < round_number - keep:
                reason = (
                    f"it has trained for round {number} and is ready in round {round_number}; "
                    f"federation.stale.keep={keep} lets no answer count that long"
                )
                self.exchange.refuse(number, TRAIN, reply.client, reason)
            elif reply.client not in out:
                self._late.append((number, reply.client))
            self._server.run.record(
                ClientTrained(
                    round=number,
                    client=reply.client,
                    seconds=reply.seconds,
                    loss=facts.get("loss"),
                    accuracy=facts.get("accuracy"),
                    epsilon=facts.get("epsilon"),
                    trained=facts.get("trained"),
                )
            )
            if facts.get("trained") == 0:
                self._server.warn(
                    f"round {number}: the privacy budget of client {reply.client} is spent; "
                    "its teacher stays as it is and goes on answering"
                )
            enough = len(self._trained) + len(self._late) == wanted
            if enough and (self._buffered or not self.exchange.simulated):
                break
        if not self._buffered:
            self._open.clear()
        trained = set(self._trained)
        self._trained = [client for client in cohort if client in trained][:wanted]
        write_statement(self._server.run)

    def _replies(self) -> Iterator[tuple[int, Answered]]:
        """Round and reply of everything that arrives, those of the earliest round first."""
        while self._open:
            idle = True
            for number in sorted(self._open):
                for reply in self._open[number]:
                    if reply is None:
                        break
                    idle = False
                    yield number, reply
                else:
                    del self._open[number]
            if idle and self._open:
                self.exchange.rest()

    def answer(self, round_number: int) -> None:
        """Ask the clients that trained, less those whose answers are held already.

        Late ones are asked about the round they trained for; their answers count by their age.
        Where a release sums securely, nobody answers: they vote under masks.
        """
        if self._server.context.sums_securely:
            secure_sum(self.exchange, self._server, round_number, self._trainers(), self._signed)
            write_statement(self._server.run)
            return
        images = self._server.context.learning_images
        self._server.late = 0
        for number in sorted({number for number, _ in self._late}):
            late = [client for each, client in self._late if each == number]
            known = {c: self.nodes.by_client[c] for c in late if c in self.nodes.by_client}
            for reply in self.exchange.ask(number, KNOWLEDGE, known, RecordDict()):
                self._server.late += self.exchange.accept(reply, number, KNOWLEDGE, images)
        held = self._server.answered(round_number)
        asked = {c: node for c, node in self._trainers().items() if c not in held}
        for reply in self.exchange.ask(round_number, KNOWLEDGE, asked, RecordDict()):
            self.exchange.accept(reply, round_number, KNOWLEDGE, images)

    def evaluate(self, round_number: int) -> None:
        """Ask for the teachers' test answers; at the end also for a verdict on the student."""
        images = self._server.context.scoring_images
        judged = self._experiment.evaluation.clients and self._server.is_over
        if not images and not judged:
            return
        content = RecordDict({STUDENT: _record(self._server.kept)}) if judged else RecordDict()
        required = JUDGED if judged else {}
        allowed = required | DETECTED if judged and self._server.context.detects else required
        for reply in self.exchange.ask(round_number, EVALUATE, self._trainers(), content):
            if not self.exchange.accept(reply, round_number, EVALUATE, images):
                continue
            facts = self.exchange.numbers(reply, round_number, EVALUATE, allowed, required)
            if facts and facts["holdout_right"] > facts["holdout_total"]:
                reason = "holdout_right: more than holdout_total"
                self.exchange.refuse(round_number, EVALUATE, reply.client, reason)
            elif facts and facts["holdout_total"]:
                self._server.run.record(
                    ClientEvaluated(
                        round=round_number,
                        client=reply.client,
                        seconds=reply.seconds,
                        holdout_right=facts["holdout_right"],
                        holdout_total=facts["holdout_total"],
                        balanced_accuracy=facts.get("balanced_accuracy"),
                        auc=facts.get("auc"),
                        sensitivity=facts.get("sensitivity"),
                    )
                )

    def _trainers(self) -> dict[int, int]:
        """Client -> node of those that trained in this round and are still there."""
        return {c: self.nodes.by_client[c] for c in self._trained if c in self.nodes.by_client}

    def _training_numbers(self) -> tuple[Mapping[str, Number], Collection[str]]:
        """The numbers that a reply about training may hold, and those it has to."""
        if self._experiment.teachers.privacy is not None:
            return TRAINED_PRIVATELY, TRAINED_PRIVATELY
        return ({}, ()) if self._experiment.release is not None else (TRAINED, ())


def _record(weights: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: tensor.cpu() for name, tensor in weights.items()})
