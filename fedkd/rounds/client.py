"""What a client does in a round."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkd.build import build_optimizer, local_training
from fedkd.data.images import ImageSet
from fedkd.io.records import read_json
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Knowledge, Teacher
from fedkd.knowledge.query import Images, Reply
from fedkd.knowledge.store import write_atomically
from fedkd.knowledge.wire import pack, unpack
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import fit_private_many
from fedkd.privacy.policy import Limits, Policy, PolicyRefused
from fedkd.randomness import stream_seed
from fedkd.rounds.budget import Budget
from fedkd.rounds.client_files import ClientFiles, SavedTeacher
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.directory import network_hash
from fedkd.training.batched import fit_many
from fedkd.training.detection import Detection
from fedkd.training.evaluation import predict
from fedkd.training.noisy.loop import Noted, fit_noisy
from fedkd.training.noisy.pair import both_of, paired
from fedkd.training.noisy.pretraining import pretrain
from fedkd.training.supervised import Fit, Regulariser, align

# What a private training gives beside the teacher: no noise would cover its loss and accuracy.
_UNKNOWN = Fit(math.nan, math.nan)


@dataclass(frozen=True)
class _Job:
    """A teacher that is ready to be trained."""

    teacher: Network
    shard: ImageSet
    seed: int
    pull: Regulariser | None


_Training = Generator[_Job, Fit, Fit]
"""A client's training: where it comes to the teacher's own, it hands that out as a job."""


def train_together(
    clients: Sequence[Client], round_number: int, student: Mapping[str, Tensor] | None = None
) -> list[Fit | Exception]:
    """`Client.train` of several clients of one experiment whose networks are of one architecture.

    Returns:
        For each client what `train` gives or raises.
    """
    shared: list[Regulariser] = []  # one for all, so that it is read for all at once
    trainings = [client.training(round_number, student, shared) for client in clients]
    begun = [_driven(partial(next, training)) for training in trainings]
    todo = [job for job in begun if isinstance(job, _Job)]
    fits = iter(_fitted(todo, clients[0].context))
    results: list[Fit | Exception] = []
    for training, result in zip(trainings, begun, strict=True):
        if isinstance(result, _Job):
            fitted = next(fits)
            if isinstance(fitted, Exception):
                result = _driven(partial(training.throw, fitted))
            else:
                result = _driven(partial(training.send, fitted))
        assert not isinstance(result, _Job), "a client trains one teacher"
        results.append(result)
    return results


def _driven(go_on: Callable[[], _Job]) -> _Job | Fit | Exception:
    """How far a training comes: to a job, to its end, or to an error, which is its client's own."""
    try:
        return go_on()
    except StopIteration as finished:
        result: Fit = finished.value
        return result
    except Exception as error:
        return error


def _fitted(jobs: Sequence[_Job], context: ExperimentContext) -> list[Fit | Exception]:
    training = local_training(context.experiment.teachers)
    teachers, shards = [job.teacher for job in jobs], [job.shard for job in jobs]
    pulls = [job.pull for job in jobs]
    together = len(jobs) > 1  # alone, and as every other network is trained, if it is one
    if context.plan is None:
        return fit_many(
            teachers,
            shards,
            **training,
            seeds=[job.seed for job in jobs],
            pulls=pulls,
            together=together,
        )
    errors = fit_private_many(
        teachers,
        shards,
        context.plan.mechanism,
        optimizer=training["optimizer"],
        augment=training["augment"],
        label_smoothing=training["label_smoothing"],
        regularisers=pulls,
        together=together,
    )
    return [_UNKNOWN if error is None else error for error in errors]


class Client:
    """A client's half of the round; its teacher lives in files, not in memory.

    Args:
        context: What the config means on this machine.
        number: Which client this is.
        run: Identity of the run.
        folder: Where this client keeps its teacher; survives restarts.
        policy: What the node allows; None in a simulation.
        budgets: Where the node keeps what all runs together have spent.
        peers: Whether (client, data, signature) fit, by the other clients' keys that this node
            has; None in a simulation.
    """

    def __init__(
        self,
        context: ExperimentContext,
        number: int,
        run: str,
        folder: Path,
        *,
        policy: Policy | None = None,
        budgets: Path | None = None,
        peers: Callable[[int, bytes, bytes], bool] | None = None,
    ) -> None:
        self.context = context
        self.experiment = context.experiment
        self.number = number
        self.run = run
        self.folder = folder
        self.peers = peers
        self.budget = Budget(context, number, folder, policy, budgets)
        self._files = ClientFiles(folder)
        self._policy = policy

    @property
    def limits(self) -> Limits:
        """How much work may be asked for."""
        return Limits() if self._policy is None else self._policy.limits

    def train(self, round_number: int, student: Mapping[str, Tensor] | None = None) -> Fit:
        """Train this round's teacher and keep it.

        A teacher already trained for this round (before a restart) is not trained again, so a
        resumed run repeats nothing and reaches the same weights. Where the privacy budget does not
        pay for the round, the last teacher stays as it is: answering about public images is free.

        Args:
            round_number: From 1.
            student: The server's student, if the config gives it back to clients.

        Raises:
            RuntimeError: the budget does not pay for a single round, or the student is not finite.
        """
        (result,) = train_together([self], round_number, student)
        if isinstance(result, Exception):
            raise result
        return result

    def training(
        self, round_number: int, student: Mapping[str, Tensor] | None, shared: list[Regulariser]
    ) -> _Training:
        """What `train` does, but for the job that it hands out.

        Args:
            round_number: From 1.
            student: As in `train`.
            shared: The regulariser of those that train together, once one of them has made it.
        """
        if (known := self._files.teacher(round_number)) is not None:
            return known.fit
        last, followed = self._files.latest(round_number - 1), None
        if self.budget.reserve(round_number, last):
            if self.experiment.teachers.noisy is None:
                teacher = self._untrained(last, student)
                result = yield from self._fit(teacher, round_number, student, shared)
            else:
                teacher, result, followed = self._fit_noisy(last, round_number)
            weights = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
        elif last is not None:
            weights, result = dict(last.weights), _UNKNOWN
        else:
            raise RuntimeError(
                f"client {self.number}'s privacy budget does not pay for a single round: it has no "
                "trained teacher to answer with"
            )
        saved = SavedTeacher(weights, result, self.budget.seal, followed)
        self._files.keep_teacher(round_number, saved)
        self.budget.settle(round_number)
        return result

    def _untrained(
        self, last: SavedTeacher | None, student: Mapping[str, Tensor] | None
    ) -> Network:
        options = self.experiment.teachers
        teacher = self._network()
        if last is not None and options.warm_start:
            teacher.load_state_dict(dict(last.weights))
        if student is not None:
            self._check_student(student)
            same = options.model_of(self.number) == self.experiment.student.model
            if options.feedback.use == "init" and same:
                teacher.load_state_dict(dict(student))
        return teacher.to(self._device)

    def _fit(
        self,
        teacher: Network,
        round_number: int,
        student: Mapping[str, Tensor] | None,
        shared: list[Regulariser],
    ) -> _Training:
        teachers = self.experiment.teachers
        feedback = teachers.feedback
        regulariser = None
        if student is not None and feedback.use == "regulariser":
            if not shared:
                options = {"weight": feedback.weight, "temperature": feedback.temperature}
                shared.append(Regulariser(self._student(student), **options))
            regulariser = shared[0]
        if student is not None and feedback.use == "align":
            align(
                teacher,
                self._student(student),
                self.context.data.transfer.images.images,
                temperature=feedback.temperature,
                epochs=feedback.epochs,
                batch_size=teachers.batch_size,
                optimizer=build_optimizer(teachers.optimizer),
                seed=stream_seed(self.experiment.seed, "align", self.number, round_number),
            )
        seed = stream_seed(self.experiment.seed, "teach", self.number, round_number)
        images = self.budget.images().among(self.context.knows(self.number))
        return (yield _Job(teacher, images, seed, regulariser))

    def _fit_noisy(
        self, last: SavedTeacher | None, round_number: int
    ) -> tuple[Network, Fit, Mapping[str, Any]]:
        """Train on labels of which some are wrong, from where the last round left both networks.

        Returns:
            What answers, how its training went, and what the next round goes on from.
        """
        experiment, data = self.experiment, self.context.data.of(self.number)
        teachers, own = experiment.teachers, self.context.data.shard(self.number)
        noisy, shard = teachers.noisy, self.budget.images()
        assert noisy is not None
        seed = stream_seed(experiment.seed, "teach", self.number, round_number)
        first, second = (
            None if network is None else network.to(self._device)
            for network in self.context.pair(self.number)
        )
        assert first is not None
        training = local_training(teachers)
        if last is None and second is not None and noisy.partner.pretraining != "none":
            common = noisy.partner.pretraining == "transfer"
            pretrain(
                second,
                data.transfer.images.images if common else shard.images,
                epochs=noisy.partner.epochs,
                batch_size=teachers.batch_size,
                optimizer=training["optimizer"],
                augment=teachers.augment,
                seed=seed,
            )
        # Of the shard as it was dealt: the budget may have drawn its labels anew.
        truth = own.true_labels
        if truth is None and self.budget.keeps is not None:
            truth = own.labels
        trained = fit_noisy(
            first,
            second,
            shard,
            noisy.options(self.budget.keeps),
            epochs=teachers.epochs,
            whole=experiment.rounds * teachers.epochs,
            knows=noisy.knows,
            batch_size=teachers.batch_size,
            optimizer=training["optimizer"],
            augment=teachers.augment,
            seed=seed,
            state=None if last is None else last.followed,
            noted=Noted(
                truth=None if self._policy is not None else truth,
                test=data.test if experiment.evaluation.teachers else None,
                every=teachers.epochs,
            ),
        )
        self._files.keep_curves(trained.state["curves"])
        return self._answering(first, second, trained.shares), trained.fit, trained.state

    def _answering(
        self, first: Network, second: Network | None, shares: tuple[float, float]
    ) -> Network:
        noisy = self.experiment.teachers.noisy
        if second is None or noisy is None or noisy.answer == "a":
            return first
        pair = paired(first, second)
        both = both_of(pair)
        assert both is not None
        both.shares.copy_(torch.tensor(shares))
        return pair

    def answer(self, images: Images, round_number: int, *, base: int = 0) -> Reply:
        """The teacher's answers about some of the public images.

        Args:
            images: Which.
            round_number: From 1.
            base: The round whose answers the server holds from this client; 0 for none.

        Raises:
            RuntimeError: the client has no teacher yet.
        """
        query = self.context.query(images, self.run, round_number, self.number, base)
        shard = self.context.data.shard(self.number)
        tensors = extract(
            self.teacher(round_number),
            self.context.images(images, self.number).images,
            query.kinds,
            views=self.context.views(round_number) if images is Images.TRANSFER else None,
            own=shard.images,
        )
        who = Teacher(self.number, len(shard), tuple(shard.class_counts().tolist()))
        knowledge = Knowledge(who, tensors)
        if images is not Images.TRANSFER or not query.codec.remembers:
            return pack(knowledge, query)
        # Answers that the next ones may be changes of.
        before = self._files.answers(base, query.kinds)
        reply = pack(knowledge, query, before)
        if before is not None or query.index is None:
            # Kept as the server will decode them, so that both mean the same by a change.
            self._files.keep_answers(round_number, unpack(reply, query, self.number, before))
        return reply

    def probabilities(self, round_number: int) -> Tensor:
        """The teacher's answers about the transfer images as a server would read them, (N, C)."""
        query = self.context.query(Images.TRANSFER, self.run, round_number, self.number)
        read = unpack(self.answer(Images.TRANSFER, round_number), query, self.number)
        return torch.softmax(read.tensors[Logits()].float(), dim=-1)

    def judge(self, student: Mapping[str, Tensor]) -> dict[str, int | float]:
        """What the student is worth on this client's held-out private images.

        Hits and how many there are; where classes are uneven, also how well each is found.
        """
        holdout = self.context.data.holdout(self.number)
        if len(holdout) == 0 or holdout.labels is None or not self._shares_the_students_eyes():
            return {"holdout_right": 0, "holdout_total": 0}
        network = self._student(student)
        if self._policy is not None:  # many students together would tell who is held
            place, which = self.folder / "judged.json", network_hash(network)
            before = read_json(place)
            if before is not None and before != which:
                raise PolicyRefused("disclose.holdout: a student of this run was judged already")
            write_atomically(place, json.dumps(which).encode(), private=True)
        predictions = predict(network, holdout.images)
        if self.context.data.heads is not None:  # the client has labels of its own head alone
            others = ~torch.tensor(self.context.knows(self.number))
            predictions = predictions.masked_fill(others, -math.inf)
        right = int((predictions.argmax(1) == holdout.labels).sum())
        counts: dict[str, int | float] = {"holdout_right": right, "holdout_total": len(holdout)}
        found = Detection.of(predictions, holdout.labels) if self.context.detects else None
        more = {} if found is None else asdict(found)
        return counts | {name: value for name, value in more.items() if value is not None}

    @property
    def _device(self) -> torch.device:
        """A GPU only if the config gives clients a share of one: Ray counts by that share."""
        granted = self.experiment.resources.client_gpus > 0 and torch.cuda.is_available()
        return torch.device("cuda" if granted else "cpu")

    def _network(self) -> Network:
        model = self.experiment.teachers.model_of(self.number)
        own = self.context.own(self.number)
        return self.context.network(model, "teacher", self.number, classes=own)

    def teacher(self, round_number: int) -> Network:
        """The teacher of this round, or the last one before it."""
        saved = self._files.latest(round_number)
        if saved is None:
            raise RuntimeError(f"client {self.number} has not trained a teacher yet")
        model = self.experiment.teachers.model_of(self.number)
        teacher = self.context.network_with(model, saved.weights, self.number)
        return teacher.to(self._device)

    def _shares_the_students_eyes(self) -> bool:
        """Whether the student can be shown this client's images."""
        context = self.context
        return context.has_student and context.data.of(self.number).modality == (
            context.data.modality
        )

    def _check_student(self, weights: Mapping[str, Tensor]) -> None:
        bad = [n for n, t in weights.items() if t.is_floating_point() and not t.isfinite().all()]
        if bad:
            raise RuntimeError(
                f"client {self.number}: the student that the server sent has weights that are not "
                f"finite ({bad[0]}); nothing is learnt from it"
            )

    def _student(self, weights: Mapping[str, Tensor]) -> Network:
        model = self.experiment.student.model
        return self.context.network_with(model, weights).to(self._device)
