"""The student's training loop, the only one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from fedkd.distillation.batches import Batch, BatchSource
from fedkd.distillation.objective import Objective, Value
from fedkd.knowledge.kinds import Kind, Logits
from fedkd.knowledge.payload import not_finite
from fedkd.losses.base import EnsembleLoss
from fedkd.models.arguments import a_network, function, one_of, whole
from fedkd.models.network import Network, shown
from fedkd.randomness import seeded
from fedkd.training.batches import batch_norm, check_batch_size
from fedkd.training.graph import Graphs, check_graphs
from fedkd.training.loop import Measured, Phase, Trainer, gradient_norm
from fedkd.training.numerics import numerics
from fedkd.training.optimizers import (
    DEFAULT_OPTIMIZER,
    Optimizer,
    an_optimizer,
    begin_moments,
)

STUDENT = Phase("the student", "lower the learning rate or a loss's weight")

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype | None] = {
    "float32": None,
    "tf32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: From 1.
        loss: Mean total loss.
        terms: Mean of each counting term, unweighted.
        lr: Learning rate of the first step.
        gradients: Norm of each weighted term's gradient on the student's parameters in the
            epoch's first batch: who pulls how hard. Empty for a single term.
    """

    epoch: int
    loss: float
    terms: dict[str, float]
    lr: float
    gradients: dict[str, float] = field(default_factory=dict)


class TrainerState(TypedDict):
    """What one training hands to the next.

    Attributes:
        optimizer: State of the optimiser.
        losses: Weights of the losses' trainable parts.
    """

    optimizer: dict[str, Any]
    losses: dict[str, Tensor]


Snapshot = Callable[[], dict[str, Any]]
"""Makes the state of a call after an epoch, to `resume` from."""


def distill(
    student: Network,
    batches: BatchSource,
    objective: Objective,
    *,
    epochs: int = 30,
    optimizer: Optimizer | None = None,
    trainer_state: TrainerState | None = None,
    resume: dict[str, Any] | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    on_epoch: Callable[[EpochRecord, Snapshot], None] | None = None,
    graphs: Graphs = "auto",
) -> tuple[list[EpochRecord], TrainerState]:
    """Train `student` (in place, on the device it is on) to match its teachers.

    Args:
        student: Network to train.
        batches: Images and the teachers' answers, on the student's device.
        objective: Losses and weights; its trainable parts are fitted to student and teachers and
            trained along.
        epochs: Passes over the batches.
        optimizer: Optimiser and schedule over these epochs.
        trainer_state: Of an earlier call, about these teachers or others: the student's momentum
            and moments, and the trainable parts of losses that still fit, are taken over; learning
            rate and schedule are not.
        resume: A snapshot of an interrupted call with the same arguments, to go on from; the
            result is the same as if it had not been interrupted.
        precision: In which networks compute; losses always compute in float32. `tf32` is what
            CUDA makes of float32 on its matrix units, and float32 elsewhere.
        seed: Seed of dropout and of the objective's own parameters.
        on_epoch: Called after every epoch with its record and a maker of snapshots.
        graphs: Whether steps are captured as graphs: "auto" on CUDA; "on" also elsewhere, where the
            same code runs without one; "off".

    Returns:
        One record per epoch trained here, and the trainer's state for a next call.

    Raises:
        RuntimeError: loss, gradient or weights are no longer finite, or a teacher's answers were
            not.
        ValueError: no loss counts in some epoch, a loss does not fit student and teachers, or
            the student cannot be trained on such batches.
    """
    epochs, seed = whole("epochs", epochs, 1), whole("seed", seed)
    options = an_optimizer("optimizer", optimizer)
    one_of("precision", precision, list(DTYPES))
    graphs = check_graphs(graphs)
    function("on_epoch", on_epoch, "a record and a maker of snapshots")
    _check_parts(student, batches, objective)
    objective.check(epochs)
    loop = _Loop(student, batches, objective, epochs, options, precision, seed, graphs)
    if trainer_state is not None:
        loop.take_over(trainer_state)
    history = []
    with numerics(loop.device, precision), seeded(seed, "student"):
        first = 1 if resume is None else loop.restore(resume)
        for epoch in range(first, epochs + 1):
            record = loop.epoch(epoch)
            history.append(record)
            if on_epoch is not None:
                on_epoch(record, lambda epoch=epoch: loop.snapshot(epoch))  # type: ignore[misc]
    if history:
        loop.trainer.finish()
    student.eval()
    return history, TrainerState(
        optimizer=loop.trainer.state(), losses=objective.adapted.state_dict()
    )


def rehearse(student: Network, batches: BatchSource, objective: Objective) -> None:
    """Refuse what `distill` would refuse before its first step.

    Args:
        student: As in `distill`; left as it is.
        batches: A few of them do.
        objective: Copied.

    Raises:
        ValueError: a loss does not fit student and teachers, or batches are too small.
    """
    _Loop(student, batches, copy.deepcopy(objective), 1, DEFAULT_OPTIMIZER, "float32", 0, "off")


def _check_parts(student: object, batches: object, objective: object) -> None:
    a_network("student", student, "images")
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective: expected a fedkd.Objective of fedkd.Terms, got {shown(objective)}"
        )
    if not all(hasattr(batches, name) for name in ("steps", "example", "order", "batch")):
        raise ValueError(
            f"batches: expected TransferBatches or OnlineBatches, got {shown(batches)}"
        )


class _Loop:
    """What lives as long as one call of `distill`."""

    def __init__(
        self,
        student: Network,
        batches: BatchSource,
        objective: Objective,
        epochs: int,
        options: Optimizer,
        precision: Precision,
        seed: int,
        graphs: Graphs,
    ) -> None:
        self.student = student
        self.batches = batches
        self.objective = objective
        self.epochs = epochs
        self.options = options
        self.device = student.mean.device
        self.dtype = DTYPES[precision]
        objective.to(self.device)
        # float16 gradients of small losses vanish unless scaled; bfloat16 has float32's range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self._check_batches()
        self._adapt(seed)
        self.trainer = Trainer(
            student,
            options,
            STUDENT,
            batches.steps * epochs,
            more=objective.parameters(),
            scaler=self.scaler,
            explain=self._explain,
            graphs=graphs,
            generators=batches.generators,
            modules=[objective],
        )
        # Where a captured step finds the weights of the terms, which change from epoch to epoch.
        names = [term.name for term in objective.terms]
        self.shares = dict(zip(names, torch.zeros(len(names), device=self.device).unbind()))
        if self.trainer.captured.captures and (obstacle := self._obstacle()) is not None:
            self.trainer.captured.give_up(obstacle)

    # -- one epoch -------------------------------------------------------------------------

    def epoch(self, epoch: int) -> EpochRecord:
        """Train one epoch."""
        # A single image is trained on in evaluation mode: batch norm cannot compare it.
        self.student.train(self.batches.samples > 1)
        self.objective.train(self.batches.samples > 1)
        lr = self.trainer.lr
        last: tuple[Batch, dict[Kind, Tensor]] | None = None
        learners = self.objective.learners_in(epoch)

        weights = self.objective.weights_in(epoch, self.epochs)
        captures = self.trainer.captured.captures
        for name, weight in weights.items() if captures else ():
            self.shares[name].fill_(weight)

        def measure(step: int, index: Tensor) -> Measured:
            nonlocal last
            batch = self.batches.batch(index, epoch, step)
            value, seen = self._value(batch, epoch, self.shares if captures else None)
            if learners:
                last = batch, seen
            return Measured(value.total, len(batch.images), value.terms)

        def after(step: int, _index: Tensor) -> None:
            for loss in learners:
                if (step + 1) % loss.meta_every == 0:
                    assert last is not None
                    self._meta_step(loss, *last)

        means = self.trainer.epoch(
            epoch,
            self.batches.order(epoch),
            measure,
            look=self._gradients if len(weights) > 1 else None,
            after=after if learners else None,
            key=tuple(weights),
        )
        gradients = {
            name: weight * norm for (name, weight), norm in zip(weights.items(), means.first)
        }
        return EpochRecord(epoch, means.loss, means.parts, lr, gradients)

    def _obstacle(self) -> str | None:
        """What cannot be captured, as far as it is known beforehand."""
        meta = [
            term.name
            for term in self.objective.terms
            if isinstance(term.loss, EnsembleLoss) and term.loss.meta_every
        ]
        if meta:
            return f"loss {meta[0]!r} learns between the steps"
        return self.batches.obstacle

    def _value(
        self, batch: Batch, epoch: int, shares: Mapping[str, Tensor] | None = None
    ) -> tuple[Value, dict[Kind, Tensor]]:
        with self._autocast():
            readings = batch.read(self.student, self.objective.reads_in(epoch))
        readings = {kind: tensor.float() for kind, tensor in readings.items()}
        value: Value = self.objective(
            readings, batch.ensemble, batch.targets, epoch, self.epochs, shares
        )
        return value, readings

    def _meta_step(self, loss: EnsembleLoss, batch: Batch, seen: dict[Kind, Tensor]) -> None:
        """Let a loss learn from what the student got wrong in this batch."""
        if batch.targets is None:
            return
        wrong = (seen[Logits()].argmax(dim=1) != batch.targets).nonzero()[:, 0]
        part = batch.rows(wrong) if len(wrong) > 1 else batch
        reader = _Reader(self.student)
        own = {f"student.{name}": p for name, p in self.student.named_parameters()}
        buffers = {f"student.{name}": buffer for name, buffer in self.student.named_buffers()}

        def forward(parameters: dict[str, Tensor]) -> dict[Kind, Tensor]:
            state = {**{name: b.clone() for name, b in buffers.items()}, **parameters}
            read: dict[Kind, Tensor] = torch.func.functional_call(reader, state, (part, loss.reads))
            return {kind: tensor.float() for kind, tensor in read.items()}

        assert part.targets is not None
        lr = float(self.trainer.optimizer.param_groups[0]["lr"])
        loss.meta_step(forward, own, part.ensemble, part.targets, lr)

    def _gradients(self, measured: Measured) -> Tensor:
        """Norm of each term's gradient on the student, before it is weighted."""
        weights = [p for p in self.student.parameters() if p.requires_grad]
        return torch.stack([gradient_norm(term, weights) for term in measured.parts.values()])

    def _explain(self, epoch: int, step: int) -> str | None:
        """Whether the teachers were to blame: batches are the same when they are drawn again."""
        for number, batch in enumerate(self.batches.epoch(epoch)):
            if number == step:
                return not_finite(batch.ensemble)
        return None

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    # -- state -----------------------------------------------------------------------------

    def _check_batches(self) -> None:
        """Refuse batches of one for what has batch norm; a single image is another matter."""
        if self.batches.samples > 1:
            size = self.batches.batch_size
            check_batch_size(self.student, size, STUDENT.batch_size, STUDENT.who)

    def _check_losses(self, seed: int) -> None:
        """Refuse batches of one for losses that need more."""
        single = self.batches.samples == 1
        for key, adapted in self.objective.adapted.items() if not single else ():
            if batch_norm(adapted) is not None:
                name = self.objective.terms[int(key.split("-")[0])].name
                raise ValueError(
                    f"{STUDENT.batch_size}: loss {name!r} brings a layer with batch norm, which "
                    "cannot train on batches of one; take at least 2"
                )
        alone = self._gradients_of(1, seed)
        together = {} if single else self._gradients_of(4, seed)
        for name, norm in alone.items():
            if norm == 0 and together.get(name, 1.0) > 0:
                key = "images: there is only one" if single else f"{STUDENT.batch_size}: is 1"
                raise ValueError(
                    f"{key}, but loss {name!r} learns from the images of a batch together; take "
                    "more, or another loss"
                )

    def _gradients_of(self, count: int, seed: int) -> dict[str, float]:
        """Norm of each term's gradient on the student, from the first images of the example."""
        batch = self.batches.example()
        batch = batch.rows(torch.arange(min(count, len(batch.images)), device=self.device))
        weights = [p for p in self.student.parameters() if p.requires_grad]
        norms: dict[str, float] = {}
        mode = self.student.training
        self.student.eval()
        self.objective.eval()
        with seeded(seed, "example"):
            for epoch in sorted({term.start for term in self.objective.terms}):
                value, _ = self._value(batch, epoch)
                for name, term in value.terms.items():
                    norms[name] = float(gradient_norm(term, weights))
        self.student.train(mode)
        return norms

    def _adapt(self, seed: int) -> None:
        example = self.batches.example()
        if (problem := not_finite(example.ensemble)) is not None:
            raise RuntimeError(problem)
        mode = self.student.training
        self.student.eval()
        with torch.no_grad(), seeded(seed, "example"):
            readings: dict[Kind, Tensor] = example.read(self.student, self.objective.reads)
        self.student.train(mode)
        self.objective.adapt(readings, example.ensemble, seed)
        if min(self.batches.batch_size, self.batches.samples) == 1:
            self._check_losses(seed)

    def take_over(self, state: TrainerState) -> None:
        """Go on where an earlier call ended, with this call's learning rate and schedule.

        Teachers may have come or gone since: of the optimiser only the student's parameters, which
        come first, are sure to be the same, of the losses the parts of the same name and shape.
        """
        own = self.objective.adapted.state_dict()
        kept = {
            key: part
            for key, part in state["losses"].items()
            if key in own and own[key].shape == part.shape
        }
        self.objective.adapted.load_state_dict(kept, strict=False)
        count = sum(p.requires_grad for p in self.student.parameters())
        optimizer = self.trainer.optimizer
        groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]
        moments = {n: value for n, value in state["optimizer"]["state"].items() if n < count}
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        begin_moments(optimizer)

    def snapshot(self, epoch: int) -> dict[str, Any]:
        """Everything needed to go on after `epoch`."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "epoch": epoch,
            "student": _on_cpu(self.student),
            "losses": _on_cpu(self.objective.adapted),
            "optimizer": copy.deepcopy(self.trainer.state()),
            "schedule": self.trainer.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": generators,
        }

    def restore(self, state: dict[str, Any]) -> int:
        """Take up a snapshot; returns the epoch that comes next."""
        self.student.load_state_dict(state["student"])
        self.objective.adapted.load_state_dict(state["losses"])
        self.trainer.take_up(state["optimizer"])
        self.trainer.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generators"]["cpu"])
        if "cuda" in state["generators"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
        return int(state["epoch"]) + 1


class _Reader(nn.Module):
    """Reading a student as a call of a module, so that it can be made with other parameters."""

    def __init__(self, student: Network) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: Batch, kinds: tuple[Kind, ...]) -> dict[Kind, Tensor]:
        """Kind -> tensor."""
        return batch.read(self.student, kinds)


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
