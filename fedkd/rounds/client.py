"""What a client does in a round."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkd.build import build_network, build_optimizer, local_training
from fedkd.data.images import ImageSet
from fedkd.io.records import read_json
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Knowledge, Teacher
from fedkd.knowledge.query import Answers, Images, Reply
from fedkd.knowledge.store import write_atomically
from fedkd.knowledge.wire import pack, unpack
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import fit_private
from fedkd.privacy.label_dp import randomised
from fedkd.privacy.ledger import Account, BudgetSpent, Ledger, LedgerBroken
from fedkd.privacy.plan import Plan
from fedkd.privacy.policy import Limits, Policy, PolicyRefused
from fedkd.randomness import stream_seed
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.directory import load_state, network_hash, save_state
from fedkd.training.evaluation import predict
from fedkd.training.supervised import Fit, Regulariser, align, fit

logger = logging.getLogger(__name__)

# Epsilon of an owner who sets none.
_UNLIMITED = 1e9


class Client:
    """A client's half of the round; its teacher lives in files, not in memory.

    Args:
        workspace: What the config means on this machine.
        number: Which client this is.
        run: Identity of the run.
        folder: Where this client keeps its teacher; survives restarts.
        policy: What the node allows; None in a simulation.
        budgets: Where the node keeps what all runs together have spent.
    """

    def __init__(
        self,
        workspace: ExperimentContext,
        number: int,
        run: str,
        folder: Path,
        *,
        policy: Policy | None = None,
        budgets: Path | None = None,
    ) -> None:
        self._policy = policy
        self._budgets = budgets
        self.workspace = workspace
        self.experiment = workspace.experiment
        self.number = number
        self.run = run
        self.folder = folder

    @property
    def limits(self) -> Limits:
        """How much work may be asked for."""
        return Limits() if self._policy is None else self._policy.limits

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
            try:
                saved = load_state(place)
                return Fit(saved["loss"], saved["accuracy"])
            except (RuntimeError, KeyError, TypeError) as error:  # the disk lost it: train it again
                logger.warning("client %d: %s; it is trained again", self.number, error)
                place.unlink()
        if self.workspace.plan is not None and not self._afford(round_number, self.workspace.plan):
            # The teacher stays as it is; answering about public images costs nothing.
            frozen = self._latest(round_number - 1)
            if frozen is None:
                raise RuntimeError(
                    f"client {self.number}'s privacy budget does not pay for a single round: it "
                    "has no trained teacher to answer with"
                )
            self._keep(place, load_state(frozen)["weights"], Fit(math.nan, math.nan))
            return Fit(math.nan, math.nan)
        feedback = self.experiment.teachers.feedback
        model = self.experiment.teachers.model_of(self.number)
        teacher = self._network()
        before = self._latest(round_number - 1)
        if before is not None and self.experiment.teachers.warm_start:
            teacher.load_state_dict(load_state(before)["weights"])
        regulariser = None
        if student is not None:
            self._check_student(student)
        if (
            student is not None
            and feedback.use == "init"
            and model == self.experiment.student.model
        ):
            teacher.load_state_dict(dict(student))
        elif student is not None and feedback.use == "regulariser":
            regulariser = Regulariser(
                self._student(student), weight=feedback.weight, temperature=feedback.temperature
            )
        teacher.to(self._device)
        if student is not None and feedback.use == "align":
            align(
                teacher,
                self._student(student),
                self.workspace.data.transfer.images.images,
                temperature=feedback.temperature,
                epochs=feedback.epochs,
                batch_size=self.experiment.teachers.batch_size,
                optimizer=build_optimizer(self.experiment.teachers.optimizer),
                seed=stream_seed(self.experiment.seed, "align", self.number, round_number),
            )
        if self.workspace.plan is None:
            result = fit(
                teacher,
                self._lessons(),
                **local_training(self.experiment.teachers),
                seed=stream_seed(self.experiment.seed, "teach", self.number, round_number),
                pull=regulariser,
            )
        else:
            options = local_training(self.experiment.teachers)
            fit_private(
                teacher,
                self.shard,
                self.workspace.plan.mechanism,
                optimizer=options["optimizer"],
                augment=options["augment"],
                label_smoothing=options["label_smoothing"],
                regulariser=regulariser,
            )
            result = Fit(math.nan, math.nan)  # no noise would cover them
        self._keep(place, teacher.state_dict(), result)
        if self.workspace.plan is not None:
            self._ledger(self.workspace.plan).settle(round_number)
        for old in sorted(self.folder.glob("teacher-*.pt"))[:-2]:
            old.unlink()
        return result

    def _keep(self, place: Path, state: Mapping[str, Tensor], fit: Fit) -> None:
        weights = {name: tensor.cpu() for name, tensor in state.items()}
        plan = self.workspace.plan
        seal = {} if plan is None else {"seal": self._ledger(plan).seal}
        save_state(place, {"weights": weights, **asdict(fit), **seal}, private=True)

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
        account = Account(
            self.number, self._fingerprint, plan.epsilon, plan.delta, privacy.accountant
        )
        return Ledger(self.folder / "privacy.jsonl", account)

    def _ledger_of_all_runs(self) -> Ledger | None:
        """What all runs on these images may spend together; None if the node has no policy."""
        if self._policy is None or self._budgets is None:
            return None
        privacy, promise = self.experiment.teachers.privacy, self._policy.promise
        assert privacy is not None
        account = Account(
            self.number,
            self._fingerprint,
            promise.epsilon or _UNLIMITED,
            promise.delta or (self.workspace.plan.delta if self.workspace.plan else 0.5),
            privacy.accountant,
        )
        return Ledger(self._budgets / f"{self._fingerprint[:32]}.jsonl", account, of_run=False)

    @cached_property
    def _fingerprint(self) -> str:
        """Of all private images with their labels, held out or not: a run chooses which are."""
        images = self.workspace.data.held_by(self.number)
        data = hashlib.sha256(images.fingerprint().encode())
        if images.labels is not None:
            data.update(images.labels.numpy().tobytes())
        return data.hexdigest()

    def _afford(self, round_number: int, plan: Plan) -> bool:
        """Reserve what this round's training costs, before an image is looked at."""
        if self._policy is not None and plan.delta * len(self.shard) >= 1:
            logger.error(
                "delta %g is not below 1 / %d images held: training refused",
                plan.delta, len(self.shard),
            )  # fmt: skip
            # How many there are is this node's secret, so the reason stays in its own log.
            raise PolicyRefused("promise.delta: refused; this node's log says why")
        ledger = self._ledger(plan)
        last = self._latest(round_number - 1)
        if last is not None and not ledger.holds(load_state(last).get("seal", "")):
            raise LedgerBroken(
                f"{ledger.path}: does not know of the teacher {last.name}: nothing more is spent"
            )
        everything = self._ledger_of_all_runs()
        try:
            if everything is not None and ledger.affords(plan.steps):
                everything.reserve(round_number, plan.steps)
            ledger.reserve(round_number, plan.steps)
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
        everything = self._ledger_of_all_runs()
        if everything is not None and self._budgets is not None:  # of all runs, not of this one
            place = self._budgets / f"{self._fingerprint[:32]}-labels-{privacy.epsilon:g}.pt"
        if not place.is_file():  # drawn once: a second draw would be a second release
            if everything is not None:
                everything.reserve_labels(privacy.epsilon)
            labels = randomised(shard.labels, len(shard.classes), privacy.epsilon)
            save_state(place, {"labels": labels}, private=True)
        return replace(shard, labels=load_state(place)["labels"])

    def answer(self, images: Images, round_number: int, *, base: int = 0) -> Reply:
        """The teacher's answers about some of the public images.

        Args:
            images: Which.
            round_number: From 1.
            base: The round whose answers the server holds from this client; 0 for none.

        Raises:
            RuntimeError: the client has no teacher yet.
        """
        query = self.workspace.query(images, self.run, round_number, self.number, base)
        shard = self.shard
        tensors = extract(
            self._teacher(round_number),
            self.workspace.images(images).images,
            query.kinds,
            views=self.workspace.views(round_number) if images is Images.TRANSFER else None,
            own=shard.images,
        )
        who = Teacher(self.number, len(shard), tuple(shard.class_counts().tolist()))
        knowledge = Knowledge(who, tensors)
        if images is not Images.TRANSFER or not query.codec.remembers:
            return pack(knowledge, query)
        # Answers that the next ones may be changes of.
        before = self._answers(base, query.kinds)
        reply = pack(knowledge, query, before)
        if before is not None or query.index is None:
            # Kept as the server will decode them, so that both mean the same by a change.
            self._keep_answers(unpack(reply, query, self.number, before), round_number)
        return reply

    def _answers(self, base: int, kinds: tuple[Kind, ...]) -> Answers | None:
        """This client's answers of round `base`; None if it does not have them any more."""
        place = self._answers_place(base)
        if base == 0 or not place.is_file():
            return None
        with np.load(place, allow_pickle=False) as saved:
            return {kind: saved[str(kind)] for kind in kinds if str(kind) in saved}

    def _keep_answers(self, knowledge: Knowledge, round_number: int) -> None:
        buffer = io.BytesIO()
        arrays = {str(kind): tensor.numpy() for kind, tensor in knowledge.tensors.items()}
        np.savez(buffer, allow_pickle=False, **arrays)
        write_atomically(self._answers_place(round_number), buffer.getvalue(), private=True)
        for old in sorted(self.folder.glob("answers-*.npz"))[:-3]:
            old.unlink()

    def _answers_place(self, round_number: int) -> Path:
        return self.folder / f"answers-{round_number:04d}.npz"

    def judge(self, student: Mapping[str, Tensor]) -> tuple[int, int]:
        """(right, total) of the student on this client's held-out private images."""
        holdout = self.workspace.data.holdout(self.number)
        if len(holdout) == 0 or holdout.labels is None:
            return 0, 0
        network = self._student(student)
        if self._policy is not None:  # many students together would tell who is held
            place, which = self.folder / "judged.json", network_hash(network)
            before = read_json(place)
            if before is not None and before != which:
                raise PolicyRefused("disclose.holdout: a student of this run was judged already")
            write_atomically(place, json.dumps(which).encode(), private=True)
        predictions = predict(network, holdout.images)
        return int((predictions.argmax(1) == holdout.labels).sum()), len(holdout)

    def _network(self) -> Network:
        model = self.experiment.teachers.model_of(self.number)
        return build_network(self.experiment, model, self.workspace.data, "teacher", self.number)

    def _check_student(self, weights: Mapping[str, Tensor]) -> None:
        bad = [n for n, t in weights.items() if t.is_floating_point() and not t.isfinite().all()]
        if bad:
            raise RuntimeError(
                f"client {self.number}: the student that the server sent has weights that are not "
                f"finite ({bad[0]}); nothing is learnt from it"
            )

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
