"""What the server does in a round."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedkd.config import Participation
from fedkd.fusion.base import FitContext, Fusion, fit_rules
from fedkd.io.records import Damaged
from fedkd.io.text import ranges
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Knowledge, fuse
from fedkd.knowledge.query import Images, Refused, Reply
from fedkd.knowledge.wire import unpack
from fedkd.models.network import Network
from fedkd.rounds.context import ExperimentContext
from fedkd.rounds.evidence import evidence_of
from fedkd.rounds.learners import Learners
from fedkd.rounds.progress import Notify, Stopwatch, silent
from fedkd.rounds.release import keep_sum, let_out, release_answers, summed
from fedkd.rounds.server_teachers import server_teachers_of
from fedkd.rounds.stale import Sources, aged, collect, sources
from fedkd.runs.choice import is_over, kept_round, validated
from fedkd.runs.directory import RunDirectory, keep_weights, network_hash
from fedkd.runs.events import (
    ClientsAsked,
    DomainScores,
    OldAnswersCounted,
    RoundFinished,
    SumAsked,
)
from fedkd.runs.quarantine import distrusted, strike
from fedkd.runs.signature import Signature, keep_signature
from fedkd.training.detection import Detection
from fedkd.training.evaluation import Scores, accuracy, evaluate, predict

logger = logging.getLogger(__name__)


class Clients(Protocol):
    """The clients of a round, whoever carries the messages; replies go to `Server.accept`."""

    def train(self, round_number: int) -> None:
        """Let them train their teachers."""

    def answer(self, round_number: int) -> None:
        """Ask them about the images that the student learns from."""

    def evaluate(self, round_number: int) -> None:
        """Ask them about the test images, once the student has learnt."""


class Server:
    """The server's half of the round.

    Args:
        context: What the config means on this machine.
        run: Where everything is written; one with checkpoints goes on from the last one.
        notify: Receives progress.

    Attributes:
        round: The last round that is finished; 0 before the first.
    """

    def __init__(
        self, context: ExperimentContext, run: RunDirectory, notify: Notify = silent
    ) -> None:
        self.context = context
        self.experiment = context.experiment
        self.run = run
        self.notify = notify
        keep_signature(run, Signature.of(self.experiment, context.data, context.root))
        self._own = server_teachers_of(context)
        keep_weights(run.path, context.weights)
        self._learners = Learners(context, run, notify)
        #: The fusion rules as fitted to the last round, and what they remember of it.
        self._rules: list[Fusion] = list(context.fusion)
        self._states: list[dict[str, Tensor]] = []
        #: Round -> whom it asked, where that is not simply all clients.
        self._asked = {event.round: event for event in run.events(ClientsAsked)}
        self._fitted: set[int] = set()  # to whose answers
        #: Client -> the finished rounds that it answered in, as far as they were looked through.
        self._rounds_of: dict[int, list[int]] = {}
        self._looked_through = 0
        #: Answers to earlier rounds that arrived in this one (`federation.mode: buffered`).
        self.late = 0
        self.round = 0
        checkpoint = run.load_checkpoint(run.warn)
        if checkpoint is not None:
            self.round = int(checkpoint["round"])
            self._learners.load(checkpoint)
            self._states = checkpoint["rules"]
        #: Round -> how good its student is on the validation images, as far as there are any.
        events = run.events(RoundFinished)
        self._validated = validated(event for event in events if event.round <= self.round)

    @property
    def student(self) -> Network:
        """The one network that comes out."""
        return self._learners.student

    @property
    def is_over(self) -> bool:
        """Whether no further round comes, once the student has learnt in this one."""
        return is_over(self.experiment, self._validated)

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """The weights that leave the run: of this round, or of the best by validation."""
        number = kept_round(self.experiment, self._validated)
        if number is None or number == max(self._validated):
            state: Mapping[str, Tensor] = self.student.state_dict()
            return state
        checkpoint = self.run.load_kept()
        assert checkpoint is not None
        student: Mapping[str, Tensor] = checkpoint["student"]
        return student

    def keep(self) -> None:
        """Make the student the one that leaves the run, after the last round."""
        if self.experiment.evaluation.best:
            self.student.load_state_dict(self.kept)

    def run_round(self, number: int, clients: Clients | None = None) -> RoundFinished:
        """The round: accept, fuse, learn, evaluate, record, checkpoint.

        Without a quorum the student stays as it is and the round is *degraded*.

        Args:
            number: From 1.
            clients: Train and answer; None where all answers are held already.
        """
        resources = self.experiment.resources
        gpus = self.student.mean.device.type == "cuda" or resources.client_gpus > 0
        watch = Stopwatch(gpus=gpus)
        self.notify("round_start", round=number, rounds=self.experiment.rounds)
        if clients is not None:
            with watch.measure("train", workers=True):
                clients.train(number)
            with watch.measure("knowledge", workers=True):
                clients.answer(number)
        fused = None
        if self.has_quorum(number):
            epochs = self.experiment.distillation.epochs
            self.notify("phase", round=number, phase="distil", total=epochs)
            with watch.measure("fuse"):
                fused = self.fuse(number)
            limit = self.experiment.federation.quarantine
            answered = self.answered(number)  # nobody is struck twice for one answer
            for client in distrusted(fused, limit.trust) if limit.after is not None else ():
                if client in answered:
                    strike(self.run, number, client, "the fusion rules gave it no weight")
            with watch.measure("distil"):
                self._learners.learn(number, fused)
        with watch.measure("evaluate"):
            images = self.context.data.validation
            self._validated[number] = evaluate(self.student, images) if len(images) else None
            if clients is not None:
                clients.evaluate(number)
            scores = self._evaluate(number, fused)
        finished = replace(
            scores,
            hash=network_hash(self.student),
            status="degraded" if fused is None else "ok",
            answered=self.answered(number),
            seconds=watch.seconds,
            joules=watch.joules,
            memory=watch.memory,
            gpu_memory=watch.gpu_memory,
        )
        self._finish(finished)
        return finished

    def accept(
        self,
        client: int,
        round_number: int,
        asked: Sequence[Images],
        replies: Mapping[Images, Reply],
    ) -> None:
        """Check a client's replies and keep them on disk, all or none. Raises `Refused`."""
        if set(replies) != set(asked):
            raise Refused(f"answers about {_names(replies)} images, asked about {_names(asked)}")
        accepted = [self._checked(client, round_number, each, replies[each]) for each in asked]
        for images, knowledge in zip(asked, accepted, strict=True):
            self.run.knowledge(round_number, images).put(knowledge)
        if round_number <= self._looked_through:  # it came late
            insort(self._rounds_of.setdefault(client, []), round_number)

    def attempt(self, round_number: int, attempt: int, clients: Collection[int]) -> None:
        """Record that these clients are asked for their votes in one secure sum of the round."""
        mu = self.context.round_sum.mu
        asked = SumAsked(round=round_number, attempt=attempt, clients=sorted(clients), mu=mu)
        self.run.record(asked)

    def attempts(self, round_number: int) -> int:
        """How many sums the round has asked for."""
        return sum(event.round == round_number for event in self.run.events(SumAsked))

    def repeats_left(self, round_number: int) -> int:
        """How often clients will still be asked for votes in this round: each later has its own."""
        release = self.context.release
        assert release is not None
        later = self.experiment.rounds - round_number
        return release.times(self.experiment.rounds) - later - len(self.run.events(SumAsked))

    def accept_sum(self, round_number: int, values: Mapping[int, np.ndarray]) -> None:
        """Add up masked votes of all clients of a sum and keep what is let out of it."""
        keep_sum(self.context, self.run, round_number, values)

    def _checked(self, client: int, round_number: int, images: Images, reply: Reply) -> Knowledge:
        base = self.base(client, round_number) if images is Images.TRANSFER else 0
        query = self.context.query(images, self.run.identity, round_number, client, base)
        held = self.run.knowledge(base).answers(client, query.kinds) if base > 0 else None
        return unpack(reply, query, client, held)

    def base(self, client: int, round_number: int) -> int:
        """The last round before this one whose answer is held from a client; 0 for none.

        Only asked for by codecs that send changes, and where a part of the samples is asked about.
        """
        if not self.context.codec.remembers and self.experiment.federation.subset == 1:
            return 0
        for earlier in range(self._looked_through + 1, round_number):
            for who in self.answered(earlier):
                self._rounds_of.setdefault(who, []).append(earlier)
            self._looked_through = earlier
        known = (n for n in reversed(self._rounds_of.get(client, [])) if n < round_number)
        return next((n for n in known if self._is_held(client, n)), 0)

    def _is_held(self, client: int, round_number: int) -> bool:
        try:
            self.run.knowledge(round_number).check(client)
        except (Damaged, OSError) as error:  # then it is as if it had not answered
            logger.warning("%s", error)
            return False
        return True

    def recover(self) -> None:
        """Take up the round that was under way when the server ended, if it was killed.

        Half-written answers are removed, and those that the disk lost or changed: these clients
        are asked again.
        """
        number = self.round + 1
        stores = {images: self.run.knowledge(number, images) for images in Images}
        for store in stores.values():
            store.sweep()
        for images, store in stores.items():
            for client in store.clients():
                try:
                    store.check(client)
                except (Damaged, OSError) as error:
                    store.drop(client)
                    if images is Images.VALIDATION:  # comes and goes with those it came with
                        stores[Images.TRANSFER].drop(client)
                    self.warn(
                        f"round {number}: client {client} is asked again, since its answer was "
                        f"lost ({error})"
                    )

    def answered(self, round_number: int) -> list[int]:
        """Clients whose answers about the round's transfer images are held, or summed, already."""
        if self.context.sums_securely:
            return summed(self.run, round_number)
        return self.run.knowledge(round_number).clients()

    def draw(self, round_number: int, there: Collection[int]) -> Sequence[int]:
        """Whom the round asks of the clients that are there: drawn once, whatever happens then.

        Where fewer are there than a round needs, nobody: their privacy would be spent for nothing.
        """
        asked = self._asked.get(round_number)
        if asked is None:
            drawn = self.context.cohort(round_number, there)
            options = self.experiment.federation.participation
            few = len(drawn.there) < options.minimum
            asked = ClientsAsked(
                round=round_number,
                asked=[] if few else list(drawn.asked),
                wanted=min(drawn.wanted, self.experiment.federation.buffer or drawn.wanted),
                there=ranges(drawn.there),
            )
            if few:
                self.warn(
                    f"round {round_number}: {len(drawn.there)} clients are there, "
                    f"federation.participation.minimum is {options.minimum}: nobody is asked"
                )
            if options != Participation() or asked.wanted < drawn.wanted:
                self.run.record(asked)
                self._asked[round_number] = asked
        return asked.asked

    def wanted(self, round_number: int) -> int:
        """How many clients the round is meant to learn from."""
        asked = self._asked.get(round_number)
        return self.experiment.clients if asked is None else asked.wanted

    def has_quorum(self, round_number: int) -> bool:
        """Whether enough of the clients asked have answered for the round to teach the student."""
        federation = self.experiment.federation
        heads = self.experiment.student.heads
        if heads and not self._all_heads(sources(self.run, round_number, federation)):
            return False
        answered = len(self.answered(round_number)) + self.late
        least = max(federation.participation.minimum, federation.quorum * self.wanted(round_number))
        return answered >= least

    def _all_heads(self, clients: Collection[int]) -> bool:
        """Whether these clients together know every head of the student."""
        dealt = self.experiment.heads
        known = {dealt[client] for client in clients} if dealt else set()
        return known >= set(self.experiment.student.heads)

    def fuse(self, round_number: int) -> Fused:
        """The round's teachers together, and those whose earlier answers still count."""
        if self.context.sums_securely:
            return let_out(self.context, self.run, round_number)
        store = self.run.knowledge(round_number)
        rounds = sources(self.run, round_number, self.experiment.federation)
        old = {client: number for client, number in rounds.items() if number < round_number}
        if old:
            self.run.record(OldAnswersCounted(round=round_number, clients=old))
        evidence = self._evidence(round_number, rounds)
        self._rules = fit_rules(self.context.fusion, evidence, self._states)
        self._fitted = set(rounds)
        if self.context.release is not None:
            return release_answers(self.context, self.run, round_number, evidence.bank)
        device = self.student.mean.device
        fused = fuse(
            evidence.bank,
            self._rules,
            labels=evidence.labels,
            store=store.allocate,
            device=device,
        )
        heads, labels = self.context.data.heads, evidence.labels
        if heads is None:
            return fused
        named = heads.named(fused.probabilities) if labels is None else heads.targets(labels)
        return replace(fused, targets=named)

    def _evidence(self, round_number: int, rounds: Sources) -> FitContext:
        """What the rules look at: each client's answers of its round."""
        bank = collect(self.run, Images.TRANSFER, self.context.kinds, rounds)
        bank = aged(bank, self.context, rounds, self.base)
        return evidence_of(self.context, self.run, round_number, bank, self.student, rounds)

    def _evaluate(self, round_number: int, fused: Fused | None) -> RoundFinished:
        """How good student, teachers and their ensemble are on the public images."""
        data = self.context.data
        labels = data.test.labels
        assert labels is not None
        teachers: dict[int, float | None] = {}
        answers = predict(self.student, data.test.images)
        by_head = self._by_head("student", answers)
        detection = self._detection("student", answers, labels)
        ensemble = None
        store = self.run.knowledge(round_number, Images.TEST)
        if store.clients():
            bank = store.bank(self.context.prediction_kinds)
            for teacher, array in zip(bank.teachers, bank.arrays[Logits()], strict=True):
                logits = torch.from_numpy(teacher.widened(np.array(array, np.float32)))
                who = teacher.number
                by_head |= self._by_head(str(who), logits, who)
                teachers[who] = accuracy(*self._questions(logits, labels, who))
                detection |= self._detection(str(who), logits, labels)
            if fused is not None and (rules := self._rules_for(round_number, bank)) is not None:
                both = bank.only(self.answered(round_number))
                both = self._own.beside(both, Images.TEST, round_number)
                device = self.student.mean.device
                fused_tests = fuse(both, rules, store=store.allocate, device=device)
                together = fused_tests.probabilities
                fused_logits = together.clamp(min=1e-12).log()
                ensemble = Scores.of(*self._questions(fused_logits, labels))
                by_head |= self._by_head("ensemble", fused_logits)
                detection |= self._detection("ensemble", fused_logits, labels)
        return RoundFinished(
            round=round_number,
            student=Scores.of(*self._questions(answers, labels)),
            heads=by_head,
            validation=self._validated[round_number],
            teachers=teachers,
            ensemble=ensemble,
            weights={} if fused is None else fused.shares,
            server_teachers=self._own.accuracies(),
            server_weights=[] if fused is None else list(fused.server_shares.values()),
            pseudo_labels=None if fused is None else self._pseudo_labels(fused),
            detection=detection,
            sources=self._on_sources(round_number) if data.source_tests else None,
        )

    def _questions(
        self, logits: Tensor, labels: Tensor, client: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is judged: with several heads an image asks each, or the one of a client."""
        heads = self.context.data.heads
        if heads is None:
            return logits, labels
        own = None if client is None else [self.experiment.heads[client]]
        return heads.questions(logits, labels, own)

    def _by_head(
        self, who: str, logits: Tensor, client: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Accuracy of each head on the test images, or of a client's own."""
        heads, labels = self.context.data.heads, self.context.data.test.labels
        if heads is None or labels is None:
            return {}
        names = heads.names if client is None else (self.experiment.heads[client],)
        asked = {name: heads.questions(logits, labels, [name]) for name in names}
        return {who: {name: accuracy(*each) for name, each in asked.items()}}

    def _detection(self, who: str, logits: Tensor, labels: Tensor) -> dict[str, Detection]:
        """How well each class is found, where that is measured."""
        found = Detection.of(logits, labels) if self.context.detects else None
        return {} if found is None else {who: found}

    def _on_sources(self, round_number: int) -> list[DomainScores]:
        """How good student and teachers are in the domains that clients have learnt in."""
        data, store = self.context.data, self.run.knowledge(round_number, Images.SOURCES)
        assert data.domains is not None
        answers: dict[int, Tensor] = {}
        if store.clients():
            bank = store.bank((Logits(),))
            answers = {
                teacher.number: torch.from_numpy(teacher.widened(np.array(array, np.float32)))
                for teacher, array in zip(bank.teachers, bank.arrays[Logits()], strict=True)
            }
        found = []
        for number, (shift, test) in enumerate(
            zip(data.domains.sources, data.source_tests, strict=True)
        ):
            assert test.labels is not None
            here = slice(number * len(test), (number + 1) * len(test))
            teachers = {who: accuracy(logits[here], test.labels) for who, logits in answers.items()}
            student = accuracy(predict(self.student, test.images), test.labels)
            found.append(DomainScores(str(shift), student, teachers))
        return found

    def _pseudo_labels(self, fused: Fused) -> float | None:
        """Accuracy of the fused answers, where the true classes are known."""
        hidden = self.context.data.transfer.true_labels
        if hidden is None:
            return None
        right = hidden if fused.index is None else hidden[fused.index]
        return accuracy(*self._questions(fused.probabilities, right))

    def _rules_for(self, round_number: int, tests: Bank) -> Sequence[Fusion] | None:
        """The round's rules for the teachers that answered the test images as well.

        Rules are fitted to teachers in their order. A client may answer about one set of images
        only, its other answer be refused, or only an earlier one count: then they are fitted to
        those who answered both in this round.
        """
        clients = set(self.answered(round_number)) & {teacher.number for teacher in tests.teachers}
        if not clients or not self._all_heads(clients):
            return None
        if clients == self._fitted:
            return self._rules
        both = self._evidence(round_number, dict.fromkeys(sorted(clients), round_number))
        return fit_rules(self.context.fusion, both, self._states)

    def _finish(self, finished: RoundFinished) -> None:
        """Record the round and keep the student: the point a resumed run goes on from."""
        self.round = finished.round
        self._states = [rule.state for rule in self._rules]
        self.run.record(finished)
        self.run.save_checkpoint(self.round, {**self._learners.state, "rules": self._states})
        self.notify("round", **finished.facts())

    def warn(self, text: str) -> None:
        """Show something that people should know, now and in the report."""
        self.run.warn(text)
        self.notify("warning", text=text)


def _names(images: Iterable[Images]) -> str:
    return " and ".join(sorted(images)) or "no"
