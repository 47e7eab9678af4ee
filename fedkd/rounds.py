"""One round, from both ends: what a client does (`Client`) and what the server does (`Server`).

No transport and no config file in here: `strategies/` moves the bytes, `simulations/` decides
where the two ends live.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedkd.build import (
    build_codec,
    build_data,
    build_fusion,
    build_network,
    build_objective,
    build_release,
    device_of,
)
from fedkd.chains import with_assistant, with_memory
from fedkd.config import Component, ConfigError, Experiment, make_experiment, parse_yaml
from fedkd.data.images import ImageSet, class_map
from fedkd.data.own import Own
from fedkd.data.splits import FederatedData
from fedkd.data.views import virtual_view
from fedkd.distillation import EpochRecord, Snapshot, distill
from fedkd.evaluation import accuracy, calibration, evaluate, per_class_accuracy, predict
from fedkd.fusion.base import Evidence, Fusion, fit_rules
from fedkd.knowledge.extract import extract, shapes
from fedkd.knowledge.kinds import Kind, Logits, Pooled, VirtualLogits
from fedkd.knowledge.payload import Bank, Fused, Knowledge, Teacher, fuse
from fedkd.knowledge.store import write_atomically
from fedkd.knowledge.wire import Expected, Header, HeaderValue, Refused, pack, unpack
from fedkd.lessons import SharedLessons
from fedkd.models.network import Network, parameter_count
from fedkd.objective import Objective
from fedkd.pretraining import pretrain
from fedkd.privacy.label_dp import randomised
from fedkd.privacy.leaks import check_leaks
from fedkd.privacy.ledger import Account, BudgetSpent, Ledger
from fedkd.privacy.plan import Plan, plan
from fedkd.randomness import stream, stream_seed
from fedkd.release.base import Release, Released, system_noise
from fedkd.release.gaussian import epsilon_of
from fedkd.rundir import RunDirectory, load_state, network_hash, save_state
from fedkd.teachers.dp_sgd import fit_private
from fedkd.teachers.private_check import check_private
from fedkd.teachers.sgd import Fit, align, fit

# Below this many steps in a whole run no student has learnt much; said, since it looks like a bug.
FEW_STEPS = 100


# In a reply, before the names of answers about the server's labelled images.
_VALIDATION = "validation:"


class Notify(Protocol):
    """Hears of progress as it happens: an event's name and its facts."""

    def __call__(self, event: str, **facts: Any) -> None:
        """One event."""


def silent(event: str, **facts: Any) -> None:
    """Hears nothing."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block on `count` CPU threads: floating-point sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workspace:
    """What both ends derive from the config alone: split, orders, virtual views."""

    def __init__(
        self, experiment: Experiment, root: str | Path | None = None, own: Own | None = None
    ) -> None:
        self.experiment = experiment
        self.data: FederatedData = build_data(experiment, root, own)
        self.objective = build_objective(experiment)
        self.codec = build_codec(experiment)
        self.fusion = build_fusion(experiment)
        self.release = build_release(experiment)
        #: What clients are asked: for the losses, and for the fusion rules.
        fusion_needs = [kind for rule in self.fusion for kind in rule.needs]
        self.kinds = tuple(dict.fromkeys((*self.objective.needs, *fusion_needs)))
        #: What they are asked about images on which only predictions matter.
        self.prediction_kinds = tuple(dict.fromkeys((Logits(), *fusion_needs)))
        views = any(isinstance(kind, VirtualLogits) for kind in self.kinds)
        if experiment.federation.subset < 1 and experiment.data.views.refresh and views:
            raise ConfigError(
                "federation.subset: answers kept from earlier rounds are about that round's "
                "virtual views: set data.views.refresh=false"
            )
        self.class_map = class_map(self.data.classes)
        self._test_fingerprint: str | None = None
        self._views: dict[tuple[int, int], Tensor] = {}
        check_leaks(experiment, self.fusion, self.kinds)
        self.plan = plan(experiment)
        self._models = _describe(experiment, self.data, self.objective, self.kinds)

    def order(self, run: str, round_number: int, client: int, base: int = 0) -> Expected:
        """What a client is asked to say about the transfer set in this round.

        The server holds its answers of round `base` already, if that is not 0.
        """
        transfer = self.data.transfer
        images = len(transfer.images)
        expected = self._expect(run, round_number, client, self.kinds, transfer.fingerprint, images)
        index = self.asked(round_number) if base > 0 else None
        return replace(expected, base=base, index=index)

    def asked(self, round_number: int) -> np.ndarray | None:
        """Samples that clients already known are asked about in a round, sorted; None for all."""
        share, total = self.experiment.federation.subset, len(self.data.transfer.images)
        if share == 1:
            return None
        drawn = torch.randperm(
            total, generator=stream(self.experiment.seed, "subset", round_number)
        )
        index: np.ndarray = drawn[: max(1, round(share * total))].sort().values.numpy()
        return index

    def test_order(self, run: str, round_number: int, client: int) -> Expected:
        """What a client is asked to say about the test images (for evaluation only)."""
        if self._test_fingerprint is None:
            self._test_fingerprint = self.data.test.fingerprint()
        fingerprint, images = self._test_fingerprint, len(self.data.test)
        return self._expect(run, round_number, client, self.prediction_kinds, fingerprint, images)

    def validation_order(self, run: str, round_number: int, client: int) -> Expected | None:
        """What a client is asked to say about the server's labelled images, if a rule needs it."""
        images = self.data.validation
        if not any(rule.needs_validation for rule in self.fusion) or len(images) == 0:
            return None
        kinds, fingerprint = self.prediction_kinds, images.fingerprint()
        return self._expect(run, round_number, client, kinds, fingerprint, len(images))

    def views(self, round_number: int) -> Callable[[int], Tensor]:
        """View number -> the transfer images under this round's virtual view."""
        options = self.experiment.data.views
        moment = round_number if options.refresh else 0

        def view(number: int) -> Tensor:
            key = (moment, number)
            if key not in self._views:
                if len(self._views) >= 4:  # a few rounds' views would fill the memory
                    self._views.pop(next(iter(self._views)))
                self._views[key] = virtual_view(
                    self.data.transfer.images.images,
                    seed=stream_seed(self.experiment.seed, "views", moment),
                    view=number,
                    strength=options.strength,
                    flip=options.flip,
                )
            return self._views[key]

        return view

    def _expect(
        self,
        run: str,
        round_number: int,
        client: int,
        kinds: tuple[Kind, ...],
        fingerprint: str,
        samples: int,
    ) -> Expected:
        model = self._models[self.experiment.teachers.model_of(client)]
        disclose = {name for rule in self.fusion for name in rule.discloses}
        return Expected(
            run=run,
            round=round_number,
            fingerprint=fingerprint,
            class_map=self.class_map,
            num_samples=samples,
            num_classes=len(self.data.classes),
            shapes={kind: model.shapes[kind] for kind in kinds},
            codec=self.codec,
            max_abs=self.experiment.federation.max_abs_logit,
            disclose=tuple(sorted(disclose)),
            parameters=model.parameters,
        )


@dataclass(frozen=True)
class _Model:
    """What is known of a network before it is trained: shapes of what it can say, and its size."""

    shapes: dict[Kind, tuple[int, ...]]
    parameters: int


def _describe(
    experiment: Experiment, data: FederatedData, objective: Objective, asked: tuple[Kind, ...]
) -> dict[Component, _Model]:
    """Every teacher model, tried once; the student's too, so that a misfit is said at once."""

    privacy = experiment.teachers.privacy
    looks_private = privacy is not None and privacy.mechanism == "dp_sgd"

    def tried(
        model: Component, kinds: tuple[Kind, ...], where: str, private: bool = False
    ) -> _Model:
        network = build_network(experiment, model, data, "shapes")
        try:
            if private:
                assert privacy is not None
                classes, shape = len(data.classes), data.test.shape
                check_private(network, shape, classes, name=model.name, clipping=privacy.clipping)
            told = shapes(network, kinds, data.test.shape)
        except ValueError as error:
            raise ConfigError(f"{where}: {model.name!r}: {error}") from None
        return _Model(told, parameter_count(network))

    for assistant in experiment.distillation.assistants:
        both = tuple({*objective.needs, *objective.reads})
        tried(assistant, both, "distillation.assistants")
    looks = (Pooled(),) if experiment.student.pretraining.epochs > 0 else ()
    tried(experiment.student.model, (*objective.reads, *looks), "student.model")
    return {
        model: tried(model, asked, f"teachers.models.{number}", looks_private)
        for number, model in enumerate(experiment.teachers.models)
    }


@lru_cache(maxsize=2)
def workspace(config: str, root: str | None = None, own: Own | None = None) -> Workspace:
    """The workspace of a config (`to_json`), kept: a process answers many messages."""
    return Workspace(make_experiment(parse_yaml(config, "the run's config")), root, own)


class Client:
    """A client's half of the round; its teacher lives in files, not in memory.

    Args:
        workspace: What the config means on this machine.
        number: Which client this is.
        run: Identity of the run.
        folder: Where this client keeps its teacher; survives restarts.
    """

    def __init__(self, workspace: Workspace, number: int, run: str, folder: Path) -> None:
        self.workspace = workspace
        self.experiment = workspace.experiment
        self.number = number
        self.run = run
        self.folder = folder

    @property
    def shard(self) -> ImageSet:
        """The client's private images."""
        return self.workspace.data.shard(self.number)

    @property
    def _device(self) -> torch.device:
        """A GPU only if the config gives clients a share of one: Ray counts by that share."""
        granted = self.experiment.resources.client_gpus > 0 and torch.cuda.is_available()
        return torch.device("cuda" if granted else "cpu")

    def train(self, round_number: int, student: Mapping[str, Tensor] | None = None) -> Fit:
        """Train this round's teacher and keep it.

        A teacher already trained for this round (before a restart) is not trained again, so a
        resumed run repeats nothing and reaches the same weights.

        Args:
            round_number: From 1.
            student: The server's student, if the config gives it back to clients.
        """
        place = self._place(round_number)
        if place.is_file():
            saved = load_state(place)
            return Fit(saved["loss"], saved["accuracy"])
        if self.workspace.plan is not None and not self._afford(round_number, self.workspace.plan):
            # The teacher stays as it is; answering about public images costs nothing.
            frozen = self._latest(round_number - 1)
            state = (
                self._network().state_dict() if frozen is None else load_state(frozen)["weights"]
            )
            weights = {name: tensor.cpu() for name, tensor in state.items()}
            save_state(place, {"weights": weights, **asdict(Fit(math.nan, math.nan))})
            return Fit(math.nan, math.nan)
        feedback = self.experiment.teachers.feedback
        model = self.experiment.teachers.model_of(self.number)
        teacher = self._network()
        before = self._latest(round_number - 1)
        if before is not None and self.experiment.teachers.warm_start:
            teacher.load_state_dict(load_state(before)["weights"])
        regulariser = None
        if (
            student is not None
            and feedback.use == "init"
            and model == self.experiment.student.model
        ):
            teacher.load_state_dict(dict(student))
        elif student is not None and feedback.use == "regulariser":
            regulariser = self._student(student)
        teacher.to(self._device)
        if student is not None and feedback.use == "align":
            align(
                teacher,
                self._student(student),
                self.workspace.data.transfer.images.images,
                self.experiment.teachers,
                seed=stream_seed(self.experiment.seed, "align", self.number, round_number),
            )
        if self.workspace.plan is None:
            result = fit(
                teacher,
                self._lessons(),
                self.experiment.teachers,
                seed=stream_seed(self.experiment.seed, "teach", self.number, round_number),
                student=regulariser,
            )
        else:
            options, mechanism = self.experiment.teachers, self.workspace.plan.mechanism
            fit_private(teacher, self.shard, options, mechanism, student=regulariser)
            result = Fit(math.nan, math.nan)  # no noise would cover them
        weights = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
        save_state(place, {"weights": weights, **asdict(result)})
        if self.workspace.plan is not None:
            self._ledger(self.workspace.plan).settle(round_number)
        for old in sorted(self.folder.glob("teacher-*.pt"))[:-2]:
            old.unlink()
        return result

    @property
    def spent(self) -> float | None:
        """Epsilon that this client has spent; None if it trains without a promise.

        Public: it follows from the number of rounds, not from any image.
        """
        privacy = self.experiment.teachers.privacy
        if privacy is not None and privacy.mechanism == "label_dp":
            return privacy.epsilon
        return None if self.workspace.plan is None else self._ledger(self.workspace.plan).spent

    def paid(self, round_number: int) -> bool:
        """Whether the budget allowed this round's training; True without a budget."""
        space = self.workspace
        return space.plan is None or self._ledger(space.plan).paid(round_number)

    def _ledger(self, plan: Plan) -> Ledger:
        privacy = self.experiment.teachers.privacy
        assert privacy is not None
        shard = self.shard
        data = hashlib.sha256(shard.fingerprint().encode())
        if shard.labels is not None:
            data.update(shard.labels.numpy().tobytes())
        account = Account(
            self.number, data.hexdigest(), plan.epsilon, plan.delta, privacy.accountant
        )
        return Ledger(self.folder / "privacy.jsonl", account)

    def _afford(self, round_number: int, plan: Plan) -> bool:
        """Reserve what this round's training costs, before an image is looked at."""
        try:
            self._ledger(plan).reserve(round_number, plan.steps)
        except BudgetSpent:
            return False
        return True

    def _lessons(self) -> ImageSet:
        """The private images, with labels that may be lies if only labels are protected."""
        privacy, shard = self.experiment.teachers.privacy, self.shard
        if privacy is None or privacy.mechanism != "label_dp" or shard.labels is None:
            return shard
        assert privacy.epsilon is not None
        place = self.folder / "labels.pt"
        if not place.is_file():  # drawn once: a second draw would be a second release
            labels = randomised(shard.labels, len(shard.classes), privacy.epsilon)
            save_state(place, {"labels": labels})
        return replace(shard, labels=load_state(place)["labels"])

    def answer(
        self, round_number: int, *, base: int = 0, test: bool = False
    ) -> tuple[dict[str, np.ndarray], dict[str, HeaderValue]]:
        """What the teacher says about the transfer (or test) images, packed for the wire.

        Args:
            round_number: From 1.
            base: The round whose answers the server holds from this client; 0 for none.
            test: About the test images.

        Raises:
            RuntimeError: the client has no teacher yet.
        """
        teacher = self._teacher(round_number)
        data = self.workspace.data
        if test:
            expected = self.workspace.test_order(self.run, round_number, self.number)
            tensors = extract(teacher, data.test.images, expected.kinds, own=self.shard.images)
        else:
            expected = self.workspace.order(self.run, round_number, self.number, base)
            tensors = extract(
                teacher,
                data.transfer.images.images,
                expected.kinds,
                views=self.workspace.views(round_number),
                own=self.shard.images,
            )
        shard = self.shard
        who = Teacher(self.number, len(shard), tuple(shard.class_counts().tolist()))
        if test:
            return pack(Knowledge(who, tensors), expected)
        more: dict[str, np.ndarray] = {}
        asked = self.workspace.validation_order(self.run, round_number, self.number)
        if asked is not None:
            told = extract(teacher, data.validation.images, asked.kinds, own=self.shard.images)
            arrays, _ = pack(Knowledge(who, told), asked)
            more = {_VALIDATION + name: array for name, array in arrays.items()}
        arrays, header = self._pack(round_number, Knowledge(who, tensors), expected)
        return {**arrays, **more}, header

    def _pack(
        self, round_number: int, knowledge: Knowledge, expected: Expected
    ) -> tuple[dict[str, np.ndarray], dict[str, HeaderValue]]:
        """For the wire; what was said is kept if the next answer will be a change of it."""
        if not expected.codec.remembers:
            return pack(knowledge, expected)
        before = self._said(expected.base, expected.kinds)
        arrays, header = pack(knowledge, expected, before)
        # Kept as the server will decode it, so that both mean the same by a change.
        if before is not None or expected.index is None:
            told = unpack(arrays, header, expected, self.number, before)
            self._remember(round_number, told)
        return arrays, header

    def _said(self, base: int, kinds: tuple[Kind, ...]) -> dict[Kind, np.ndarray] | None:
        """What this client said in round `base`; None if it does not know any more."""
        place = self.folder / f"said-{base:04d}.npz"
        if base == 0 or not place.is_file():
            return None
        with np.load(place, allow_pickle=False) as saved:
            return {kind: saved[str(kind)] for kind in kinds if str(kind) in saved}

    def _remember(self, round_number: int, told: Knowledge) -> None:
        place = self.folder / f"said-{round_number:04d}.npz"
        buffer = io.BytesIO()
        arrays = {str(kind): tensor.numpy() for kind, tensor in told.tensors.items()}
        np.savez(buffer, allow_pickle=False, **arrays)
        write_atomically(place, buffer.getvalue())
        for old in sorted(self.folder.glob("said-*.npz"))[:-3]:
            old.unlink()

    def judge(self, student: Mapping[str, Tensor]) -> tuple[int, int]:
        """(right, total) of the student on this client's held-out private images."""
        holdout = self.workspace.data.holdout(self.number)
        if len(holdout) == 0 or holdout.labels is None:
            return 0, 0
        predictions = predict(self._student(student), holdout.images)
        return int((predictions.argmax(1) == holdout.labels).sum()), len(holdout)

    def _network(self) -> Network:
        model = self.experiment.teachers.model_of(self.number)
        return build_network(self.experiment, model, self.workspace.data, "teacher", self.number)

    def _student(self, weights: Mapping[str, Tensor]) -> Network:
        student = build_network(
            self.experiment, self.experiment.student.model, self.workspace.data, "student"
        )
        student.load_state_dict(dict(weights))
        return student.to(self._device)

    def _teacher(self, round_number: int) -> Network:
        place = self._latest(round_number)
        if place is None:
            raise RuntimeError(f"client {self.number} has not trained a teacher yet")
        teacher = self._network()
        teacher.load_state_dict(load_state(place)["weights"])
        return teacher.to(self._device)

    def _place(self, round_number: int) -> Path:
        return self.folder / f"teacher-{round_number:04d}.pt"

    def _latest(self, round_number: int) -> Path | None:
        """The teacher of this round or the last one before it."""
        limit = self._place(round_number).name
        kept = [p for p in sorted(self.folder.glob("teacher-*.pt")) if p.name <= limit]
        return kept[-1] if kept else None


class Server:
    """The server's half of the round: accept, fuse, distil, evaluate, remember.

    Args:
        workspace: What the config means on this machine.
        run: Where everything is written.
        notify: Hears of progress.
    """

    def __init__(self, workspace: Workspace, run: RunDirectory, notify: Notify = silent) -> None:
        self.workspace = workspace
        self.experiment = workspace.experiment
        self.run = run
        self.notify = notify
        self._chain = self._fresh_chain()
        #: The fusion rules as fitted to the last round, and what they remember of it.
        self._rules: list[Fusion] = list(workspace.fusion)
        self._memories: list[dict[str, Tensor]] = []
        self.round = 0
        checkpoint = run.load_checkpoint()
        if checkpoint is not None:
            self.round = int(checkpoint["round"])
            states = (*checkpoint["assistants"], checkpoint["student"])
            for learner, state in zip(self._chain, states, strict=True):
                learner.network.load_state_dict(state)
            for learner, learnt in zip(self._chain, checkpoint["learnt"], strict=True):
                learner.learnt = learnt
            self._memories = checkpoint["rules"]

    @property
    def student(self) -> Network:
        """The one network that comes out."""
        return self._chain[-1].network

    # -- accept ----------------------------------------------------------------------------

    def accept(
        self,
        client: int,
        round_number: int,
        arrays: Mapping[str, np.ndarray],
        header: Header,
        *,
        test: bool = False,
    ) -> None:
        """Check a client's knowledge and keep it on disk. Raises `Refused`."""
        before = checked = None
        told = {k: a for k, a in arrays.items() if not k.startswith(_VALIDATION)}
        if test:
            expected = self.workspace.test_order(self.run.identity, round_number, client)
        else:
            base = self.held(client, round_number)
            expected = self.workspace.order(self.run.identity, round_number, client, base)
            if base > 0:
                before = self._store(base).answers(client, expected.kinds)
            asked = self.workspace.validation_order(self.run.identity, round_number, client)
            more = {k.removeprefix(_VALIDATION): a for k, a in arrays.items() if k not in told}
            if asked is not None:
                same = {**header, "fingerprint": asked.fingerprint, "base": 0}
                checked = unpack(more, same, asked, client)
            elif more:
                raise Refused(f"answers that nobody asked for: {sorted(more)}")
        knowledge = unpack(told, header, expected, client, before)
        # The transfer set's answers come last: with them the client counts as heard.
        if checked is not None:
            self.run.knowledge(round_number, "validation").put(checked)
        self._store(round_number, test).put(knowledge)

    def held(self, client: int, round_number: int) -> int:
        """The last round before this one whose answer is held from a client; 0 for none.

        Only asked for by codecs that send changes, and where a part of the samples is asked about.
        """
        if not self.workspace.codec.remembers and self.experiment.federation.subset == 1:
            return 0
        earlier = range(round_number - 1, 0, -1)
        return next((n for n in earlier if client in self.answered(n)), 0)

    def answered(self, round_number: int, *, test: bool = False) -> list[int]:
        """Clients whose knowledge of this round is held already (also from before a restart)."""
        return self._store(round_number, test).clients()

    # -- learn -----------------------------------------------------------------------------

    def has_quorum(self, round_number: int) -> bool:
        """Whether enough clients have answered for the round to teach the student."""
        answered = len(self.answered(round_number))
        return (
            answered > 0 and answered >= self.experiment.federation.quorum * self.experiment.clients
        )

    def fuse(self, round_number: int) -> Fused:
        """What the round's teachers say together."""
        store = self._store(round_number)
        transfer = self.workspace.data.transfer
        labels = transfer.images.labels if transfer.labelled else None
        bank = store.bank(self.workspace.kinds)
        looks = any(rule.needs_student for rule in self.workspace.fusion)
        validation = None
        if any(rule.needs_validation for rule in self.workspace.fusion):
            checks = self.run.knowledge(round_number, "validation")
            if checks.clients():
                validation = checks.bank(self.workspace.prediction_kinds)
        evidence = Evidence(
            bank,
            labels=labels,
            validation=validation,
            validation_labels=self.workspace.data.validation.labels,
            student=predict(self.student, transfer.images.images) if looks else None,
            seed=stream_seed(self.experiment.seed, "fuse", round_number),
        )
        self._rules = fit_rules(self.workspace.fusion, evidence, self._memories)
        if self.workspace.release is not None:
            return self._release(round_number, self.workspace.release, bank, labels)
        return fuse(bank, self._rules, labels=labels, store=store.allocate)

    def _release(
        self, round_number: int, release: Release, bank: Bank, labels: Tensor | None
    ) -> Fused:
        """What the mechanism lets out; drawn once, however often the round is taken up again."""
        place = self._store(round_number).folder / "released.pt"
        if not place.is_file():
            generator = stream(self.experiment.seed, "queries", round_number)
            index = release.asked(bank.num_samples, generator)
            probabilities = torch.softmax(bank.rows(index, kinds=(Logits(),)).logits, dim=-1)
            out = release(probabilities, index, self.experiment.rounds, system_noise())
            save_state(place, {"scores": out.scores, "index": out.index, "mu": out.mu})
        out = Released(**load_state(place))
        self.run.metric(
            "release",
            round=round_number,
            mechanism=self.experiment.release.name if self.experiment.release else "",
            answered=len(out.index),
            mu=out.mu,
            epsilon=epsilon_of(out.mu, release.delta),
            delta=release.delta,
            unit=release.unit,
        )
        if len(out.index) < 2:
            raise RuntimeError(
                f"round {round_number}: the release answered {len(out.index)} of the transfer "
                "images; raise its epsilon, lower its threshold, or take more clients"
            )
        crowd = Teacher(self.experiment.clients)
        logits = out.scores.clamp(min=1e-4).log().numpy()
        targets = out.scores.argmax(dim=1) if labels is None else labels[out.index]
        together = Bank((crowd,), {Logits(): [logits]})
        return Fused(together, out.scores, targets, out.index)

    def learn(self, round_number: int, fused: Fused) -> list[EpochRecord]:
        """Distil the fused teachers into the student."""
        options = self.experiment.distillation
        steps = options.epochs * math.ceil(len(self.workspace.data.transfer) / options.batch_size)
        if round_number == 1 and steps * self.experiment.rounds < FEW_STEPS:
            self.warn(
                f"the student takes only {steps} steps per round: raise distillation.epochs or "
                "lower distillation.batch_size"
            )
        images, views = self._shown(round_number, fused)
        needs = self.workspace.objective.needs
        if options.memory > 0 and round_number > 1:
            who = Teacher(self.experiment.clients, parameters=parameter_count(self.student))
            told = extract(self.student, images, needs, views=views)
            fused = with_memory(fused, Knowledge(who, told), options.memory)
        if not options.warm_start and round_number > 1:
            self._chain = self._fresh_chain()
        if self.experiment.student.pretraining.epochs > 0 and (
            round_number == 1 or not options.warm_start
        ):
            self._pretrain(round_number)
        for rank, assistant in enumerate(self._chain[:-1], start=1):
            network = assistant.network
            self._teach(assistant, fused, round_number, "assist", rank)
            who = Teacher(self.experiment.clients + rank, parameters=parameter_count(network))
            told = extract(network, images, needs, views=views)
            fused = with_assistant(fused, Knowledge(who, told), options.guidance, rank)
        return self._teach(self._chain[-1], fused, round_number, "learn")

    def _shown(self, round_number: int, fused: Fused) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The transfer images that `fused` is about, and their virtual views."""
        images = self.workspace.data.transfer.images.images
        views, index = self.workspace.views(round_number), fused.index
        if index is None:
            return images, views
        return images[index], lambda number: views(number)[index]

    def _pretrain(self, round_number: int) -> None:
        """Let a fresh student look at the transfer images before it is taught."""
        options = self.experiment.student.pretraining
        losses = pretrain(
            self.student,
            self.workspace.data.transfer.images.images,
            epochs=options.epochs,
            augment=options.augment,
            batch_size=options.batch_size,
            optimizer=options.optimizer,
            seed=stream_seed(self.experiment.seed, "pretrain"),
        )
        self.run.metric("pretraining", round=round_number, losses=losses)

    def _teach(
        self, learner: _Learner, fused: Fused, round_number: int, *names: object
    ) -> list[EpochRecord]:
        """Distil into one network of the chain."""
        options = self.experiment.distillation
        is_student = learner is self._chain[-1]

        def on_epoch(record: EpochRecord, _snapshot: Snapshot) -> None:
            event = "epoch" if is_student else "assistant_epoch"
            self.run.metric(event, round=round_number, **asdict(record))
            if is_student:
                self.notify("epoch", round=round_number, epoch=record.epoch, loss=record.loss)

        seed = stream_seed(self.experiment.seed, *names, round_number)
        images, views = self._shown(round_number, fused)
        lessons = SharedLessons(
            images,
            fused,
            views=views,
            batch_size=options.batch_size,
            curriculum=options.curriculum,
            seed=seed,
            device=learner.network.mean.device,
        )
        history, learner.learnt = distill(
            learner.network,
            lessons,
            self.workspace.objective,
            epochs=options.epochs,
            optimizer=options.optimizer,
            ema=options.ema,
            seed=seed,
            on_epoch=on_epoch,
            **learner.learnt,
        )
        return history

    # -- evaluate --------------------------------------------------------------------------

    def evaluate(self, round_number: int, fused: Fused | None) -> dict[str, Any]:
        """How good student, teachers and their ensemble are on the public test set."""
        data = self.workspace.data
        labels = data.test.labels
        assert labels is not None
        predictions = predict(self.student, data.test.images)
        facts: dict[str, Any] = {"student": _scores(predictions, labels)}
        if len(data.validation) > 0:
            facts["validation"] = evaluate(self.student, data.validation)
        store = self._store(round_number, test=True)
        if store.clients():
            bank = store.bank(self.workspace.prediction_kinds)
            facts["teachers"] = {
                teacher.client: accuracy(torch.from_numpy(np.asarray(array, np.float32)), labels)
                for teacher, array in zip(bank.teachers, bank.arrays[Logits()], strict=True)
            }
            together = fuse(bank, self._rules, store=store.allocate).probabilities
            facts["ensemble"] = _scores(together.clamp(min=1e-12).log(), labels)
        hidden = data.transfer.true_labels
        if fused is not None and hidden is not None:
            shown = hidden if fused.index is None else hidden[fused.index]
            facts["pseudo_labels"] = accuracy(fused.probabilities, shown)
        return facts

    def finish_round(self, round_number: int, **facts: Any) -> None:
        """Write the round down and keep the student: the point a resumed run goes on from."""
        self.round = round_number
        self._memories = [rule.memory for rule in self._rules]
        student = network_hash(self.student)
        self.run.metric("round", round=round_number, hash=student, **facts)
        states = [
            {name: tensor.cpu() for name, tensor in learner.network.state_dict().items()}
            for learner in self._chain
        ]
        self.run.save_checkpoint(
            round_number,
            {
                "student": states[-1],
                "assistants": states[:-1],
                "learnt": [learner.learnt for learner in self._chain],
                "rules": self._memories,
            },
        )
        self.notify("round", round=round_number, **facts)

    def warn(self, text: str) -> None:
        """Say something that people should know, now and in the report."""
        self.run.metric("warning", text=text)
        self.notify("warning", text=text)

    def _store(self, round_number: int, test: bool = False) -> Any:
        return self.run.knowledge(round_number, "test" if test else "transfer")

    def _fresh_chain(self) -> list[_Learner]:
        """Untrained assistants and student."""
        device = device_of(self.experiment)
        experiment, data = self.experiment, self.workspace.data
        networks = [
            build_network(experiment, model, data, "assistant", rank)
            for rank, model in enumerate(experiment.distillation.assistants, start=1)
        ]
        networks.append(build_network(experiment, experiment.student.model, data, "student"))
        return [_Learner(network.to(device)) for network in networks]


@dataclass
class _Learner:
    """A network of the chain, and what its last training hands to the next."""

    network: Network
    learnt: dict[str, Any] = field(default_factory=dict)


def _scores(predictions: Tensor, labels: Tensor) -> dict[str, Any]:
    return {
        "accuracy": accuracy(predictions, labels),
        "per_class": per_class_accuracy(predictions, labels),
        "calibration": asdict(calibration(predictions, labels)),
    }


class Stopwatch:
    """Seconds per named phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, name: str) -> _Lap:
        """Context manager that adds its duration to `name`."""
        return _Lap(self.seconds, name)


class _Lap:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent
