"""The one epoch loop: optimiser, schedule, clipping, and checks.

Whatever is trained (teachers, student, shadow models, baselines) differs in how a batch becomes
a loss. The rest is here, so that every option of `Optimizer` acts everywhere and no training
returns a network with weights that are not finite, or one that took no step.

A step is three functions over tensors: `measure` (a batch becomes a loss), `Trainer.backward` and
`Trainer.move`. None of them fetches a number from an accelerator, so a step can be captured as a
graph (`fedkd.training.graph`); the schedule writes the learning rate where the graph reads it.
What is fetched is fetched by the log of the epoch, between the steps: at each on a CPU, every
`SELDOM` steps elsewhere.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedkd.data.views import Draws
from fedkd.training.batches import batches, check_batch_size, positive, steps_per_epoch
from fedkd.training.graph import Captured, Graphs
from fedkd.training.optimizers import Optimizer, begin_moments, make_optimizer

# Steps between looks at loss and gradient: on an accelerator each look makes it wait.
CHECK_EVERY = {"cpu": 1}
SELDOM = 50

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Phase:
    """What is trained, in the words of messages.

    Attributes:
        who: Whose weights move ("the teacher").
        remedy: What to do about a loss that is no longer finite.
        batch_size: Key of the batch size.
    """

    who: str
    remedy: str = "lower the learning rate"
    batch_size: str = "batch_size"


@dataclass(frozen=True)
class Measured:
    """One batch, measured.

    Attributes:
        loss: What is minimised, a scalar: the mean over the batch.
        count: Samples of the batch.
        parts: Scalars that the loss is made of, by name, unweighted; averaged like the loss and
            named if it is not finite.
        sums: Further scalars, added up over the epoch.
    """

    loss: Tensor
    count: int
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def numbers(self) -> list[Tensor]:
        """Loss, parts and sums, float32 without gradient."""
        numbers = [self.loss, *self.parts.values(), *self.sums.values()]
        return [number.detach().float() for number in numbers]


@dataclass(frozen=True)
class Means:
    """What an epoch gave.

    Attributes:
        loss: Mean over its samples.
        parts: Likewise for each part.
        sums: Each sum over the epoch.
        count: Samples seen.
        first: What was looked at in the first step.
    """

    loss: float
    parts: dict[str, float]
    sums: dict[str, float]
    count: int
    first: list[float] = field(default_factory=list)


Measure = Callable[[int, Batch], Measured]
"""(step of the epoch from 0, batch) -> its loss."""

Look = Callable[[Measured], Tensor]
"""A batch's loss, before its gradient is computed -> numbers (n,)."""

Explain = Callable[[int, int], str | None]
"""(epoch, step from 0) -> what was wrong with that batch before the network saw it, or None."""


_ends: ContextVar[float] = ContextVar("ends", default=math.inf)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """No step of a training inside begins later than this; None: any time.

    Raises:
        RuntimeError: from the training, when the time is over.
    """
    token = _ends.set(math.inf if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _ends.reset(token)


def check_time() -> None:
    """Raise `RuntimeError` if the time of `time_limit` is over."""
    if time.monotonic() > _ends.get():
        raise RuntimeError("training took longer than its time limit (limits.seconds of a policy)")


class Trainer:
    """Takes the steps of one training; what it trains is given by `measure`.

    Args:
        network: What is trained, in place.
        options: Optimiser, schedule, clipping.
        phase: In which words to complain.
        total_steps: Steps of all epochs together, for the schedule.
        more: Parameters trained along that are not the network's.
        scaler: Scales the loss where gradients are computed in float16.
        explain: Asked before the learning rate is blamed.
        graphs: Whether steps are captured as graphs. If so batches are tensors on the device,
            and what `measure` draws or reads beside them lies there and stays there.
        generators: Generators on the device that `measure` draws from.
        modules: Further modules that it uses.

    Raises:
        ValueError: the network has no weights that may be trained.
        RuntimeError: its weights are not finite to begin with.
    """

    def __init__(
        self,
        network: nn.Module,
        options: Optimizer,
        phase: Phase,
        total_steps: int,
        *,
        more: Iterable[nn.Parameter] = (),
        scaler: torch.amp.GradScaler | None = None,
        explain: Explain | None = None,
        graphs: Graphs = "off",
        generators: Iterable[torch.Generator] = (),
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self.network = network
        self.phase = phase
        own = [p for p in network.parameters() if p.requires_grad]
        if not own:
            raise ValueError(
                f"{phase.who} has no weights to train: none of its parameters has requires_grad"
            )
        check_finite(network, f"{phase.who}'s weights are not finite before its training")
        self.parameters = [*own, *(p for p in more if p.requires_grad)]
        self.device = own[0].device
        self.optimizer, self.schedule = make_optimizer(
            self.parameters, options, total_steps, on_device=self.device.type == "cuda"
        )
        self.total_steps = total_steps
        self.steps = 0
        self._moved = False
        self._applied = False
        self._max_grad_norm = options.max_grad_norm
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.explain = explain
        self.captured = Captured(
            self._whole,
            self.device,
            graphs,
            generators=generators,
            modules=[network, *modules],
            what=f"{phase.who}'s training step",
        )
        self._running: tuple[int, Measure[Any], Look | None] | None = None
        self._latest = _Names()
        self._names: dict[Hashable, _Names] = {}

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.schedule.lr

    @property
    def scales(self) -> bool:
        """Whether gradients are scaled, so that steps may be left out."""
        return self._scaler is not None

    def epoch(
        self,
        number: int,
        batches: Iterable[Batch],
        measure: Measure[Batch],
        *,
        look: Look | None = None,
        after: Callable[[int, Batch], None] | None = None,
        key: Hashable = (),
    ) -> Means:
        """Train one epoch.

        Args:
            number: From 1.
            batches: One per step.
            measure: Makes a loss of each.
            look: Asked in the first step alone; what it gives is fetched after the epoch.
            after: Called after each step, none of which is captured then.
            key: What `measure` depends on beside the batch: another key is another graph.

        Raises:
            RuntimeError: there was no batch, or loss, gradient or weights are not finite.
        """
        log = _Log(self, number)
        with self.captured.aside():
            for step, batch in enumerate(batches):
                check_time()
                first = look if step == 0 else None
                if self.captured.captures and after is None:
                    with self._blamed(log, number, step):
                        self._replay(log, step, batch, measure, first, key)
                    continue
                with self._blamed(log, number, step):
                    measured = measure(step, batch)
                log.add_loss(measured)
                if first is not None:
                    log.first = first(measured)
                norm = self.backward(measured.loss)
                log.add_gradient(norm, lambda: measure(step, batch))  # noqa: B023
                self.update()
                if after is not None:
                    after(step, batch)
                del measured  # with the graph of this step
        means = log.means()
        self._moved |= log.moved
        self._applied |= log.applied
        self._check_epoch(number)
        return means

    @contextmanager
    def _blamed(self, log: _Log, number: int, step: int) -> Iterator[None]:
        """Find out whether an error in a step has a cause that lies before it."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            log.check()  # if something was not finite before, that is the reason
            if self.explain is not None and (cause := self.explain(number, step)):
                raise RuntimeError(cause) from error
            raise

    def finish(self) -> None:
        """Look back at the whole training.

        Raises:
            RuntimeError: no step was taken.
        """
        # Whoever owns this trainer may be asked through it, and holds maps of files: let go of it.
        self.explain = None
        if self.captured.count:
            self.optimizer.zero_grad(set_to_none=True)  # they lie in the memory of a capture
        self.captured.forget()
        self._running = None
        who = self.phase.who
        if self.steps == 0:
            raise RuntimeError(f"{who} was not trained: there was no step to take")
        if not self._applied:
            raise RuntimeError(
                f"{who} was not trained: in float16 the gradient of none of {self.steps} steps was "
                "finite; take precision bfloat16 or float32, or more steps"
            )
        if not self._moved:
            logger.warning(
                "%s has learnt nothing: its loss had no gradient in any of %d steps",
                who,
                self.steps,
            )

    def backward(self, loss: Tensor) -> Tensor:
        """The gradient of a loss, clipped if asked for.

        Args:
            loss: A scalar.

        Returns:
            Norm of the gradient before it was clipped, a scalar on the device.

        Raises:
            RuntimeError: the loss does not depend on what is trained.
        """
        if not loss.requires_grad:
            raise RuntimeError(
                f"{self.phase.who}'s loss does not depend on its weights: nothing can be learnt "
                "from it"
            )
        for parameter in self.parameters:
            parameter.grad = None
        if self._scaler is None:
            loss.backward()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self.optimizer)
        if self._max_grad_norm is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return _total_norm(gradients)

    def move(self) -> None:
        """Move the weights along the gradient."""
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def update(self) -> None:
        """Move the weights along the gradient, and the schedule by a step."""
        self.move()
        self._advance()

    def _advance(self) -> None:
        self.schedule.step()
        self.steps += 1

    def _replay(
        self,
        log: _Log,
        step: int,
        batch: Any,
        measure: Measure[Any],
        look: Look | None,
        key: Hashable,
    ) -> None:
        """A whole step, captured once it has been taken a few times."""
        self._running = step, measure, look
        place = key, tuple(batch.shape), look is not None
        numbers = self.captured(batch, key=place)
        if place not in self._names:
            self._names[place] = self._latest
        self._advance()
        names, row = self._names[place], numbers.clone()
        if look is not None:
            log.first = row[names.width :]
        log.add_step(names, row[: names.width])

    def _whole(self, batch: Any) -> Tensor:
        """Measures a batch and moves the weights.

        Returns:
            The log's row, with the gradient's norm last, then what was looked at.
        """
        assert self._running is not None
        step, measure, look = self._running
        measured = measure(step, batch)
        more = [] if look is None else [look(measured)]
        norm = self.backward(measured.loss)
        self.move()
        self._latest = _Names(tuple(measured.parts), tuple(measured.sums), measured.count)
        return torch.cat([torch.stack([*measured.numbers, norm.detach().float()]), *more])

    def state(self) -> dict[str, Any]:
        """The optimiser's state, with plain numbers for learning rates."""
        state = self.optimizer.state_dict()
        groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on with the state of a trainer of the same parameters, on whatever device it was."""
        own = self.optimizer.state_dict()["param_groups"]
        for group, theirs in zip(own, state["param_groups"], strict=True):
            lr = group["lr"]
            group["lr"] = lr.fill_(theirs["lr"]) if isinstance(lr, Tensor) else theirs["lr"]
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": own})
        begin_moments(self.optimizer)

    def _check_epoch(self, number: int) -> None:
        who = self.phase.who
        check_finite(
            self.network, f"{who}'s weights are not finite after epoch {number}", self.phase.remedy
        )
        if self._scaler is not None and self._scaler.get_scale() < 1:
            raise RuntimeError(
                f"the gradient of {who}'s loss is not finite in epoch {number}, however little it "
                f"is scaled for float16; {self.phase.remedy}, or take precision bfloat16"
            )


@dataclass(frozen=True)
class _Names:
    """What the numbers of a step are called, and of how many samples they are."""

    parts: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    count: int = 0

    @property
    def width(self) -> int:
        """How many there are, loss and gradient included."""
        return len(self.parts) + len(self.sums) + 2


class _Log:
    """The numbers of an epoch, left on the device: asking for one makes an accelerator wait."""

    def __init__(self, trainer: Trainer, epoch: int) -> None:
        self._trainer = trainer
        self._epoch = epoch
        self._every = CHECK_EVERY.get(trainer.device.type, SELDOM)
        self._parts: list[str] = []
        self._sums: list[str] = []
        self._counts: list[int] = []
        self._pending: list[Tensor] = []  # of a step whose gradient is not known yet
        self._waiting: list[Tensor] = []
        self._rows: list[list[float]] = []
        self._norms: list[float] = []
        self.first: Tensor | None = None

    @property
    def applied(self) -> bool:
        """Whether any step had a finite gradient."""
        return any(map(math.isfinite, self._norms))

    @property
    def moved(self) -> bool:
        """Whether any step had a gradient other than zero."""
        return any(self._norms)

    def add_loss(self, measured: Measured) -> None:
        """One step's loss. Raises `RuntimeError` (on an accelerator some steps later)."""
        self._parts, self._sums = list(measured.parts), list(measured.sums)
        self._pending = measured.numbers
        self._counts.append(measured.count)

    def add_gradient(self, norm: Tensor, again: Callable[[], Measured]) -> None:
        """Its gradient's norm. Raises `RuntimeError` (on an accelerator some steps later).

        Args:
            norm: A scalar.
            again: Measures the same batch once more, to find out what was wrong. Only asked on a
                CPU, where the weights are still those before the step.
        """
        self._waiting.append(torch.stack([*self._pending, norm.detach().float()]))
        self._pending = []
        if len(self._waiting) >= self._every:
            self.check(again if self._every == 1 else None)

    def add_step(self, names: _Names, row: Tensor) -> None:
        """A whole step: its loss, parts and sums, and the gradient's norm. Raises likewise."""
        self._parts, self._sums = list(names.parts), list(names.sums)
        self._counts.append(names.count)
        self._waiting.append(row)
        if len(self._waiting) >= self._every:
            self.check()

    def check(self, again: Callable[[], Measured] | None = None) -> None:
        """Fetch what is waiting. Raises `RuntimeError` for the first bad step."""
        first = len(self._norms)
        for *row, norm in torch.stack(self._waiting).tolist() if self._waiting else []:
            self._rows.append(row)
            self._norms.append(norm)
        self._waiting.clear()
        if self._pending:  # its gradient could not be computed
            self._rows.append(torch.stack(self._pending).tolist())
            self._pending = []
        for step in range(first, len(self._rows)):
            self._check_step(step, again)

    def means(self) -> Means:
        """Over all steps. Raises `RuntimeError` if there was none."""
        self.check()
        seen = sum(self._counts)
        if seen == 0:
            who = self._trainer.phase.who
            raise RuntimeError(f"{who} was not trained: epoch {self._epoch} has no batch")
        weighted = ([n * part for part in row] for n, row in zip(self._counts, self._rows))
        loss, *means = [sum(column) / seen for column in zip(*weighted)]
        rest = [row[1 + len(self._parts) :] for row in self._rows]
        sums = dict(zip(self._sums, (sum(column) for column in zip(*rest))))
        first = [] if self.first is None else self.first.tolist()
        return Means(loss, dict(zip(self._parts, means)), sums, seen, first)

    def _check_step(self, step: int, again: Callable[[], Measured] | None) -> None:
        trainer, epoch = self._trainer, self._epoch
        loss, *rest = self._rows[step]
        parts = dict(zip(self._parts, rest))
        if not math.isfinite(loss):
            raise RuntimeError(bad_loss(trainer.phase, epoch, loss, parts, self._cause(step)))
        norm = self._norms[step] if step < len(self._norms) else 0.0
        if not math.isfinite(norm) and not trainer.scales:
            culprits, cause = self._culprits(again), self._cause(step)
            raise RuntimeError(
                bad_gradient(trainer.phase, epoch, norm, loss, parts, culprits, cause)
            )

    def _culprits(self, again: Callable[[], Measured] | None) -> str:
        """Which parts of the loss have such a gradient, as far as that is known."""
        if again is None or len(self._parts) < 2:
            return ""
        norms = {
            name: float(gradient_norm(part, self._trainer.parameters))
            for name, part in again().parts.items()
        }
        bad = [repr(name) for name, norm in norms.items() if not math.isfinite(norm)]
        return f", because of {' and '.join(bad)}" if bad else ""

    def _cause(self, step: int) -> str | None:
        explain = self._trainer.explain
        return None if explain is None else explain(self._epoch, step)


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """`nn.utils.get_total_norm`; of gradients of one kind in the three operations that it is."""
    kinds = {(gradient.device, gradient.dtype) for gradient in gradients}
    if len(kinds) != 1 or gradients[0].device.type != "cpu":
        return nn.utils.get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Norm of a scalar's gradient on some parameters, a scalar; its graph is kept."""
    none = torch.zeros((), device=value.device)
    if not value.requires_grad:
        return none
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    lengths = [part.float().norm() for part in parts if part is not None]
    return torch.stack(lengths).norm() if lengths else none


def is_finite(network: nn.Module) -> bool:
    """Whether all weights and buffers of `network` are."""
    state = [t for t in network.state_dict().values() if t.is_floating_point() and t.numel()]
    if not state:
        return True
    largest = torch._foreach_norm(state, math.inf)
    return bool(torch.stack([norm.double() for norm in largest]).isfinite().all())


def check_finite(network: nn.Module, complaint: str, remedy: str = "") -> None:
    """Raise `RuntimeError` with the complaint if a weight or buffer of `network` is not finite."""
    if is_finite(network):
        return
    state = {name: t for name, t in network.state_dict().items() if t.is_floating_point()}
    name = next(name for name, tensor in state.items() if not tensor.isfinite().all())
    raise RuntimeError(f"{complaint} ({name}){'; ' if remedy else ''}{remedy}")


def bad_loss(
    phase: Phase, epoch: int, loss: float, parts: Mapping[str, float], cause: str | None = None
) -> str:
    """The complaint about a loss that is not finite.

    Args:
        phase: What is trained.
        epoch: From 1.
        loss: The loss.
        parts: What it is made of.
        cause: What was wrong with the batch, if that is known.
    """
    return f"{phase.who}'s loss is {loss} in epoch {epoch}{_shown(parts)}{_end(phase, cause)}"


def bad_gradient(
    phase: Phase,
    epoch: int,
    norm: float,
    loss: float,
    parts: Mapping[str, float],
    culprits: str = "",
    cause: str | None = None,
) -> str:
    """The complaint about a gradient that is not finite though its loss is; as `bad_loss`."""
    return (
        f"the gradient of {phase.who}'s loss is {norm} in epoch {epoch}, though the loss "
        f"is {loss:.4g}{_shown(parts)}{culprits}{_end(phase, cause)}"
    )


def _shown(parts: Mapping[str, float]) -> str:
    shown = ", ".join(f"{name} {part:.4g}" for name, part in parts.items())
    return f" ({shown})" if parts else ""


def _end(phase: Phase, cause: str | None) -> str:
    return f": {cause}" if cause else f"; {phase.remedy}"


def train_epochs(
    network: nn.Module,
    total: int,
    measure: Callable[[int, int, Tensor], Measured],
    options: Optimizer,
    phase: Phase,
    *,
    epochs: int,
    batch_size: int,
    order: torch.Generator,
    graphs: Graphs = "off",
    draws: Draws | None = None,
    modules: Iterable[nn.Module] = (),
) -> list[Means]:
    """Train `network` (in place) on samples that are known by their numbers.

    A single sample is trained on in evaluation mode: batch norm has nothing to compare it with.

    Args:
        network: Left in evaluation mode.
        total: Number of samples.
        measure: (epoch from 0, step from 0, numbers of the batch's samples, on the network's
            device) -> its loss.
        options: Optimiser, schedule, clipping.
        phase: In which words to complain.
        epochs: Passes over the samples.
        batch_size: Samples per step; a left-over batch of one is dropped.
        order: Draws the order of samples.
        graphs: As in `Trainer`.
        draws: Where `measure` draws augmentations from.
        modules: As in `Trainer`.

    Returns:
        What each epoch gave.

    Raises:
        ValueError: batches of one and batch norm, nothing to train, or nothing to train on.
        RuntimeError: loss, gradient or weights are no longer finite.
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    if total < 1:
        raise ValueError(f"{phase.who} has no images to learn from")
    if total > 1:
        check_batch_size(network, batch_size, phase.batch_size, phase.who)
    batch = min(positive(batch_size), total)
    steps = steps_per_epoch(total, batch) * epochs
    trainer = Trainer(
        network, options, phase, steps, graphs=graphs, generators=draws or (), modules=modules
    )
    network.train(total > 1)
    history = []
    for epoch in range(epochs):
        # All at once: a copy in every step would make an accelerator wait.
        permutation = torch.randperm(total, generator=order).to(trainer.device)
        indices = batches(permutation, batch)
        if draws is not None:
            draws.begin(epoch)

        def measured(step: int, index: Tensor, epoch: int = epoch) -> Measured:
            return measure(epoch, step, index)

        history.append(trainer.epoch(epoch + 1, indices, measured))
    trainer.finish()
    network.eval()
    return history
