"""Local training of many teachers together: clients of one architecture as one batch.

A small network does not fill an accelerator, and one client after the other leaves most of it idle.
Here teachers of one architecture are stacked (`fedkd.models.stacked`) and take their steps in the
same operations. Each keeps what `fit` gives it alone: its order of samples, its augmentation and
dropout, its learning rate, its number of steps, its batch-norm statistics. So it comes to the same
weights, but for the rounding of sums. Clients that are finished are taken out of the stack once
that pays.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedkd.data.images import ImageSet
from fedkd.data.views import (
    AUGMENTATIONS,
    Draws,
    augmented,
    bordered,
    can_draw,
    draw,
    drawn,
    undrawn,
)
from fedkd.models.network import Network
from fedkd.models.stacked import (
    Draw,
    Stack,
    architecture,
    check_stack,
    in_stacks,
    write_state,
)
from fedkd.randomness import stream, stream_seed
from fedkd.training.batches import batch_norm, batches, steps_per_epoch
from fedkd.training.graph import Captured, Graphs
from fedkd.training.loop import (
    SELDOM,
    Phase,
    bad_gradient,
    bad_loss,
    check_finite,
    check_time,
    is_finite,
)
from fedkd.training.numerics import numerics
from fedkd.training.optimizers import (
    DEFAULT_OPTIMIZER,
    Optimizer,
    RowOptimizer,
    learning_rate,
)
from fedkd.training.supervised import TEACHER, Fit, Pull, Regulariser, fit

# Steps in which a stack of half the size has paid for itself on an accelerator, about.
SMALLER = 100

logger = logging.getLogger(__name__)

Records = list[list[list[float]]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Options:
    """How all of them are trained."""

    epochs: int
    batch_size: int
    optimizer: Optimizer
    augment: str
    label_smoothing: float
    phase: Phase
    autocast: torch.dtype | None
    graphs: Graphs


@dataclass(frozen=True)
class _Client:
    """Who is trained, on what."""

    number: int
    teacher: Network
    shard: ImageSet
    seed: int
    pull: Pull | None


def fit_many(
    teachers: Sequence[Network],
    shards: Sequence[ImageSet],
    *,
    seeds: Sequence[int],
    epochs: int = 10,
    batch_size: int = 16,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    augment: str = "none",
    label_smoothing: float = 0.0,
    pulls: Sequence[Pull | None] | None = None,
    phase: Phase = TEACHER,
    together: bool | None = None,
    autocast: torch.dtype | None = None,
    graphs: Graphs = "auto",
) -> list[Fit | Exception]:
    """Train each teacher (in place) on its shard, as `fit` does it.

    A client that fails does not stop the others: its error stands where its `Fit` would.

    Args:
        teachers: One network per client.
        shards: Its labelled private images.
        seeds: Its seed.
        epochs: As in `fit`.
        batch_size: Likewise.
        optimizer: Likewise.
        augment: Likewise.
        label_smoothing: Likewise.
        pulls: What is added to each client's loss; None: nothing. Those of one `Regulariser` are
            computed together.
        phase: In which words to complain.
        together: Whether teachers of one architecture are trained as one batch, which rounds sums
            otherwise; None: on accelerators. Those that cannot are trained one after the other, and
            the reason is announced.
        autocast: In which precision networks compute, e.g. torch.bfloat16; losses always compute in
            float32.
        graphs: Whether a step is captured.

    Returns:
        For each client what `fit` gives, or the error that it raises.

    Raises:
        ValueError: there are more or fewer shards, seeds or pulls than teachers.
    """
    pulls = [None] * len(teachers) if pulls is None else pulls
    check_lengths(len(teachers), {"shards": shards, "seeds": seeds, "pulls": pulls})
    options = _Options(
        epochs, batch_size, optimizer, augment, label_smoothing, phase, autocast, graphs
    )
    clients = [
        _Client(number, *each)
        for number, each in enumerate(zip(teachers, shards, seeds, pulls, strict=True))
    ]

    def train(group: list[int]) -> list[Fit | Exception]:
        with numerics(teachers[group[0]].mean.device, "float32", autotune=True):
            fits = _Group([clients[number] for number in group], options).train()
        return [fits[number] for number in group]

    return train_each(
        teachers,
        lambda number: _group(clients[number], options),
        train,
        lambda number: _alone(clients[number], options),
        together=together,
    )


def train_each(
    teachers: Sequence[Network],
    key: Callable[[int], Hashable],
    train: Callable[[list[int]], Sequence[Result | Exception]],
    alone: Callable[[int], Result],
    *,
    together: bool | None,
) -> list[Result | Exception]:
    """A result for each teacher, or the error that its training raises, which stops no other.

    Args:
        teachers: One network per client.
        key: Number -> what teachers of one architecture must have in common beside it to be trained
            together; None: it is trained alone.
        train: Numbers of some teachers -> their results.
        alone: Number -> the result of one.
        together: Whether any are trained together; None: on accelerators.
    """

    def group(number: int) -> Hashable:
        if (kind := architecture(teachers[number], together)) is None:
            return None
        return None if (own := key(number)) is None else (kind, own)

    def one(number: int) -> Result | Exception:
        try:
            return alone(number)
        except Exception as error:  # of one client: it is for the caller to judge
            return error

    return in_stacks(teachers, [group(number) for number in range(len(teachers))], train, one)


def check_lengths(teachers: int, lists: Mapping[str, Sequence[object]]) -> None:
    """Raise `ValueError` unless there is one of each for each teacher."""
    for name, values in lists.items():
        if len(values) != teachers:
            raise ValueError(
                f"{name}: expected one for each of {teachers} teachers, got {len(values)}"
            )


def _group(client: _Client, options: _Options) -> Hashable:
    """What clients that are trained together have in common; None is trained alone."""
    shard, labels = client.shard, client.shard.labels
    if labels is None or len(shard) == 0 or options.epochs < 1 or options.batch_size < 1:
        return None  # `fit` names the fault
    if options.augment not in AUGMENTATIONS:
        return None
    if options.batch_size == 1 and batch_norm(client.teacher) is not None:
        return None
    if not is_finite(client.teacher):
        return None
    # A single image is read in evaluation mode.
    return shard.shape, len(shard.classes), len(shard) > 1


def _alone(client: _Client, options: _Options) -> Fit:
    with _autocast(client.teacher.mean.device, options.autocast):
        return fit(
            client.teacher,
            client.shard,
            epochs=options.epochs,
            batch_size=options.batch_size,
            optimizer=options.optimizer,
            augment=options.augment,
            label_smoothing=options.label_smoothing,
            seed=client.seed,
            pull=client.pull,
            phase=options.phase,
            graphs=options.graphs,
        )


def _autocast(
    device: torch.device, precision: torch.dtype | None
) -> AbstractContextManager[object]:
    """Casts are not kept: what one step cast, the replay of another must not read."""
    if precision is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision, cache_enabled=False)


class _Samples:
    """Which samples of a client make which of its steps: those of `train_epochs`, in its order."""

    def __init__(self, client: _Client, options: _Options) -> None:
        self.total = len(client.shard)
        self.batch = min(options.batch_size, self.total)
        self.per_epoch = steps_per_epoch(self.total, self.batch)
        self.steps = self.per_epoch * options.epochs
        self._order = stream(client.seed, "order")
        self._epoch: list[Tensor] = []

    def at(self, step: int) -> tuple[int, int, Tensor]:
        """(epoch, step of the epoch, numbers); to be asked for each step in turn."""
        epoch, within = divmod(step, self.per_epoch)
        if within == 0:
            drawn = torch.randperm(self.total, generator=self._order)
            self._epoch = list(batches(drawn, self.batch))
        return epoch, within, self._epoch[within]


class _Account:
    """What a client draws, and what becomes of it."""

    def __init__(self, client: _Client, options: _Options) -> None:
        self.client = client
        self.samples = _Samples(client, options)
        self.draws = Draws(client.seed, client.teacher.mean.device)
        self.error: Exception | None = None
        self.moved = False
        self._options = options
        self._loss, self._right, self._seen = 0.0, 0.0, 0

    def add(self, records: Records, row: int, first: int, counts: Sequence[Sequence[int]]) -> None:
        """Look at what became of some steps."""
        for number, each in enumerate(counts):
            if (count := each[row]) == 0 or self.error is not None:
                continue
            loss, entropy, pull, norm, right, finite = (column[row] for column in records[number])
            epoch = (first + number) // self.samples.per_epoch + 1
            parts = {} if self.client.pull is None else {"cross entropy": entropy, "pull": pull}
            phase = self._options.phase
            if not math.isfinite(loss):
                self.error = RuntimeError(bad_loss(phase, epoch, loss, parts))
            elif not math.isfinite(norm):
                self.error = RuntimeError(bad_gradient(phase, epoch, norm, loss, parts))
            elif not finite and (first + number + 1) % self.samples.per_epoch == 0:
                self.error = RuntimeError(
                    f"{phase.who}'s weights are not finite after epoch {epoch}; {phase.remedy}"
                )
            self.moved |= norm > 0
            if epoch == self._options.epochs:
                self._loss += count * loss
                self._right += right
                self._seen += count

    def fit(self) -> Fit | Exception:
        """What `fit` gives, or raises."""
        return self.error or Fit(self._loss / self._seen, self._right / self._seen)


@dataclass(frozen=True)
class _Chunk:
    """Some steps of a stack, prepared while those before are still computed.

    Attributes:
        index: Numbers of their images in the bank, (steps, K, B).
        numbers: (steps, 4, K): learning rate, images, and Adam's corrections.
        whole: What augmentation drew, (steps, DRAWN, K, B), on the device.
        real: Likewise, (steps, K, B).
        counts: Images of each step and client, 0 where the client has finished.
        dense: Whether all rows of a step are full.
        augmented: Images of each step where augmentation cannot wait, uint8 (K, B, ...).
    """

    index: Tensor
    numbers: Tensor
    whole: Tensor
    real: Tensor
    counts: list[list[int]]
    dense: list[bool]
    augmented: list[Tensor]


class _Group:
    """The training of a group of clients; their networks change when it is over.

    Raises:
        Unstackable: they have to be trained one after the other.
    """

    def __init__(self, clients: Sequence[_Client], options: _Options) -> None:
        self._options = options
        accounts = [_Account(client, options) for client in clients]
        # The longest first: who remains is in front.
        self._accounts = sorted(accounts, key=lambda account: -account.samples.steps)
        self._bank = _Bank([a.client.shard for a in self._accounts], options.augment, self._device)
        self._finished: dict[int, dict[str, Tensor]] = {}

    @property
    def _device(self) -> torch.device:
        return self._accounts[0].client.teacher.mean.device

    def train(self) -> dict[int, Fit | Exception]:
        """All steps of all clients."""
        teachers = [account.client.teacher for account in self._accounts]
        shards = [account.client.shard for account in self._accounts]
        stack = Stack(teachers, training=len(shards[0]) > 1)
        check_stack(stack, teachers, [shard.images for shard in shards])
        optimizer = RowOptimizer(self._options.optimizer, stack.weights)
        seeds = [stream_seed(account.client.seed, "teacher") for account in self._accounts]
        dropout = RowDropout(seeds, stack.weights)
        bank, active, done = self._bank, self._accounts, 0
        while True:
            end = _until([account.samples.steps for account in active], self._device)
            steps = _Steps(active, stack, optimizer, bank, dropout, self._options, done)
            goes_on = self._run(steps, done, end)
            steps.close()
            if not goes_on:
                break
            done = end
            rows = [n for n, a in enumerate(active) if a.samples.steps > end and a.error is None]
            active = [active[row] for row in rows]
            if not active:
                break
            where = torch.tensor(rows, device=self._device)
            stack = stack.take(where)
            optimizer = optimizer.take(where, stack.weights)
            bank = bank.take(rows)
            dropout = dropout.take(rows, stack.weights)
        for account in self._accounts:
            self._finish(account)
        return {account.client.number: account.fit() for account in self._accounts}

    def _run(self, steps: _Steps, start: int, end: int) -> bool:
        """Whether it goes on after these steps."""
        accounts = steps.accounts
        ends = [min(start + SELDOM * (n + 1), end) for n in range(-(-(end - start) // SELDOM))]
        chunk = steps.prepare(start, ends[0])
        for number, until in enumerate(ends):
            first = until - len(chunk.dense)
            steps.load(chunk)
            for step in range(first, until):
                try:
                    check_time()
                except RuntimeError as error:
                    for account in accounts:
                        if account.samples.steps > step:
                            account.error = account.error or error
                    return False
                steps.take(chunk, step - first)
                for row, account in enumerate(accounts):
                    if account.samples.steps == step + 1:
                        self._finished[account.client.number] = steps.stack.row(row)
            # Meanwhile an accelerator works on those: what comes next is prepared.
            following = ends[number + 1 : number + 2]
            coming = steps.prepare(until, following[0]) if following else None
            records: Records = steps.records.tolist()
            for row, account in enumerate(accounts):
                account.add(records, row, first, chunk.counts)
            if coming is not None:
                chunk = coming
            if all(account.error is not None for account in accounts):
                return False
        return True

    def _finish(self, account: _Account) -> None:
        client, phase = account.client, self._options.phase
        if account.error is not None:
            return
        write_state(client.teacher, self._finished[client.number])
        client.teacher.eval()
        try:
            check_finite(
                client.teacher,
                f"{phase.who}'s weights are not finite after epoch {self._options.epochs}",
                phase.remedy,
            )
        except RuntimeError as error:
            account.error = error
        if not account.moved:
            logger.warning(
                "%s has learnt nothing: its loss had no gradient in any of %d steps",
                phase.who,
                account.samples.steps,
            )


def _until(steps: Sequence[int], device: torch.device) -> int:
    """At which step those that have finished are taken out of a stack.

    Where a quarter of it has, or half, and there is more to do than a smaller stack costs: on an
    accelerator its convolutions are tried out and its step is captured anew.

    Args:
        steps: Of each client, the most first.
        device: Where.
    """
    costs = 0 if device.type == "cpu" else SMALLER
    quarter, half = steps[3 * len(steps) // 4], steps[len(steps) // 2]
    if steps[0] - quarter > 4 * costs:
        return quarter
    return half if steps[0] - half > costs else steps[0]


class _Bank:
    """The images of all clients, one after the other, on the device."""

    def __init__(self, shards: Sequence[ImageSet], augment: str, device: torch.device) -> None:
        self.shape = shards[0].shape
        self._starts = [0]
        for shard in shards:
            self._starts.append(self._starts[-1] + len(shard))
        self.augment = augment
        self.waits = can_draw(augment, device)
        images = torch.cat([shard.images.to(device) for shard in shards])
        self._images = bordered(images) if self.waits and augment != "none" else images
        self.labels = torch.cat([_labels(shard).to(device) for shard in shards])

    def start(self, row: int) -> int:
        """Number of a client's first image."""
        return self._starts[row]

    def take(self, rows: Sequence[int]) -> _Bank:
        """The same images, seen by some of the clients."""
        taken = copy.copy(self)
        taken._starts = [self._starts[row] for row in rows]
        return taken

    def augmented(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """A client's images, drawn and changed at once."""
        images = self._images[index.to(self._images.device)]
        return augmented(images, self.augment, generator)

    def batch(self, index: Tensor, whole: Tensor, real: Tensor) -> Tensor:
        """Images (K, B, channels, h, w) as they were drawn: (K, B), (DRAWN, K, B), (K, B)."""
        flat = index.flatten()
        if self.augment == "none":
            images = self._images[flat]
        else:
            images = drawn(
                self.augment, self._images, flat, self.shape, whole.flatten(1), real.flatten()
            )
        return images.unflatten(0, index.shape)


class _Steps:
    """Steps of a stack; all that they read lies where it is, so that they can be captured."""

    def __init__(
        self,
        accounts: Sequence[_Account],
        stack: Stack,
        optimizer: RowOptimizer,
        bank: _Bank,
        dropout: RowDropout,
        options: _Options,
        start: int,
    ) -> None:
        self.accounts = accounts
        self.stack = stack
        self._optimizer = optimizer
        self._bank = bank
        self._options = options
        device, weights = stack.weights.device, stack.weights
        clients, length = len(accounts), max(account.samples.batch for account in accounts)
        self._size = clients, length
        self._index = torch.zeros(SELDOM, clients, length, dtype=torch.int64, device=device)
        self._numbers = weights.new_ones(SELDOM, 4, clients)
        self._whole, self._real = self._undrawn(SELDOM)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._time = torch.full((1,), start, dtype=torch.int64, device=device)
        # Loss, its two parts, the gradient's norm, right answers, whether the weights are finite.
        self.records = weights.new_zeros(SELDOM, 6, clients)
        self._images = torch.zeros(
            0 if bank.waits else clients, length, *bank.shape, dtype=torch.uint8, device=device
        )
        self._counts: list[int] = []
        self._dropout = dropout
        foreign = any(not isinstance(a.client.pull, Regulariser | None) for a in accounts)
        self._capture = Captured(
            self._step,
            device,
            "off" if foreign else options.graphs,
            modules=[stack.base],
            what="a step of clients together",
        )
        self._dense = False
        rows: dict[Pull, list[int]] = {}
        for row, account in enumerate(accounts):
            if account.client.pull is not None:
                rows.setdefault(account.client.pull, []).append(row)
        self._pulling = {
            pull: (own, torch.tensor(own, device=device)) for pull, own in rows.items()
        }

    def _undrawn(self, steps: int) -> tuple[Tensor, Tensor]:
        clients, length = self._size
        if not self._bank.waits or self._bank.augment == "none":
            length = 0
        return undrawn(steps, (clients, length), self._bank.shape, self.stack.weights.device)

    def prepare(self, start: int, end: int) -> _Chunk:
        """What steps from `start` to before `end` need."""
        clients, length = self._size
        options, bank, device = self._options, self._bank, self.stack.weights.device
        many = end - start
        # NumPy: a thousand small assignments a chunk, while the device waits for the next one.
        index = np.empty((many, clients, length), np.int64)
        for row in range(clients):
            index[:, row] = bank.start(row)
        numbers = np.ones((many, 4, clients))
        numbers[:, 0], numbers[:, 1] = 0.0, length
        whole, real = self._undrawn(many)
        counts: list[list[int]] = []
        changed: list[Tensor] = []
        for number, step in enumerate(range(start, end)):
            counts.append([0] * clients)
            numbers[number, 2:] = np.array(RowOptimizer.corrections(step))[:, None]
            if not bank.waits:
                changed.append(torch.zeros_like(self._images))
            for row, account in enumerate(self.accounts):
                samples = account.samples
                if step >= samples.steps:
                    continue
                epoch, within, own = samples.at(step)
                count = len(own)
                counts[-1][row] = count
                index[number, row, :count] += own.numpy()
                numbers[number, 0, row] = learning_rate(options.optimizer, step, samples.steps)
                numbers[number, 1, row] = count
                if bank.augment == "none":
                    continue
                generator = account.draws.of(epoch, within, "augment")
                if bank.waits:
                    into = whole[number, :, row, :count], real[number, row, :count]
                    draw(bank.augment, bank.shape, generator, *into)
                else:
                    changed[-1][row, :count] = bank.augmented(own + bank.start(row), generator)
        dense = [all(count in (0, length) for count in each) for each in counts]
        both = torch.from_numpy(index), torch.from_numpy(numbers).to(self._numbers.dtype)
        if device.type == "cuda":
            both = both[0].pin_memory(), both[1].pin_memory()
        return _Chunk(*both, whole, real, counts, dense, changed)

    def load(self, chunk: _Chunk) -> None:
        """Put a chunk where the steps read it."""
        many = len(chunk.dense)
        self._index[:many].copy_(chunk.index, non_blocking=True)
        self._numbers[:many].copy_(chunk.numbers, non_blocking=True)
        self._whole[:many].copy_(chunk.whole)
        self._real[:many].copy_(chunk.real)
        self._row.zero_()

    def take(self, chunk: _Chunk, number: int) -> None:
        """One step."""
        if chunk.augmented:
            self._images.copy_(chunk.augmented[number])
        self._counts, self._dense = chunk.counts[number], chunk.dense[number]
        self._capture(key=self._dense)

    def close(self) -> None:
        """Let go of the capture: what it holds is the size of a training."""
        self._capture.forget()
        del self._capture  # which knows these steps

    def _step(self) -> None:
        options, stack = self._options, self.stack
        read = (self._index, self._numbers, self._whole, self._real)
        index, numbers, whole, real = (each.index_select(0, self._row)[0] for each in read)
        counts = numbers[1]
        images = self._bank.batch(index, whole, real) if self._bank.waits else self._images
        labels = self._bank.labels[index]
        there = torch.arange(labels.shape[1], device=labels.device) < counts[:, None]
        with _autocast(labels.device, options.autocast):
            logits = stack.read(
                images,
                counts=None if self._dense else counts,
                draw=self._dropout.of(self._time, self._counts),
            )
            more = self._pulls(images, labels, logits, there, counts) if self._pulling else None
        each = functional.cross_entropy(
            logits.flatten(0, 1).to(stack.weights.dtype),
            labels.flatten(),
            label_smoothing=options.label_smoothing,
            reduction="none",
        ).view_as(labels)
        entropy = _mean(each, there, counts)
        loss = entropy if more is None else entropy + more
        gradients = stack.gradients(loss.sum())
        norms = torch.linalg.vector_norm(gradients, dim=1)
        if (largest := options.optimizer.max_grad_norm) is not None:
            gradients.mul_((largest / (norms + 1e-6)).clamp(max=1.0)[:, None])
        self._optimizer.step(
            gradients, numbers[0, :, None], (numbers[2, :, None], numbers[3, :, None])
        )
        right = ((logits.argmax(2) == labels) & there).sum(1)
        finite = stack.weights.isfinite().all(1)
        parts = [entropy, torch.zeros_like(entropy) if more is None else more]
        row = [loss, *parts, norms, right, finite]
        record = torch.stack([each.detach().to(self.records.dtype) for each in row])
        self.records.index_copy_(0, self._row, record[None])
        self._row.add_(1)
        self._time.add_(1)

    def _pulls(
        self, images: Tensor, labels: Tensor, logits: Tensor, there: Tensor, counts: Tensor
    ) -> Tensor:
        """What is added to each client's loss, (K,)."""
        more = logits.new_zeros(len(self.accounts), dtype=self.stack.weights.dtype)
        for pull, (rows, where) in self._pulling.items():
            if isinstance(pull, Regulariser):
                every = len(rows) == len(self.accounts)
                own = [t if every else t[where] for t in (images, logits, there, counts)]
                student = pull.logits(own[0].flatten(0, 1))
                terms = pull.per_sample(own[1].flatten(0, 1), student).view_as(own[2])
                more = more.index_add(0, where, _mean(terms, *own[2:]).to(more.dtype))
                continue
            for row in rows:
                if (count := self._counts[row]) > 0:
                    part = pull(images[row, :count], labels[row, :count], logits[row, :count])
                    more[row] = part
        return more


class RowDropout:
    """What dropout draws for each network of a stack, whoever is trained beside it.

    On a CPU what the network alone draws from the global generator that is seeded so; elsewhere,
    where a generator can be neither one per row nor a part of a graph, a hash of seed and step.

    Args:
        seeds: Of each network.
        weights: (K, P), for type and device.
    """

    def __init__(self, seeds: Sequence[int], weights: Tensor) -> None:
        self._weights = weights
        self._keys = torch.tensor(seeds, device=weights.device)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def take(self, rows: Sequence[int], weights: Tensor) -> RowDropout:
        """Of some of the networks, whose weights now lie elsewhere."""
        taken = RowDropout([], weights)
        taken._keys = self._keys[list(rows)]
        taken._generators = [self._generators[row] for row in rows]
        return taken

    def of(self, step: Tensor, counts: Sequence[int], part: int = 0) -> Draw:
        """What one step draws.

        Args:
            step: Its number, int64 (1,), on the device: a graph counts there.
            counts: How many images of each row are there; looked at on a CPU only.
            part: Where in a step, if it takes several.
        """

        def draw(shape: tuple[int, ...], p: float, call: int) -> Tensor:
            if self._weights.device.type != "cpu":
                return hashed(shape, self._keys, step, 1000 * part + call) >= p
            kept = self._weights.new_ones(shape)
            for row, count in enumerate(counts):
                if count > 0:
                    own = self._weights.new_empty(count, *shape[2:])
                    kept[row, :count] = own.bernoulli_(1 - p, generator=self._generators[row])
            return kept

        return draw


def hashed(shape: tuple[int, ...], keys: Tensor, time: Tensor, call: int) -> Tensor:
    """Numbers in [0, 1) that follow from key, time, call and place alone, float32.

    SplitMix64 of Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
    2014: a generator's state would have to be one per client, and no graph could replay it.

    Args:
        shape: (K, ...).
        keys: int64 (K,).
        time: int64 (1,), on the same device.
        call: Which of a step's draws.
    """
    places = torch.arange(math.prod(shape[1:]), device=keys.device)
    mixed = _mix(_mix(keys + time * _GOLDEN + call * 1_000_003)[:, None] + places * _GOLDEN)
    return ((mixed >> 40) & 0xFFFFFF).float().div(1 << 24).view(shape)


# 64-bit constants of SplitMix64 as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _mix(z: Tensor) -> Tensor:
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _mean(values: Tensor, there: Tensor, counts: Tensor) -> Tensor:
    """Mean over the images of a row that are there, (K, B) -> (K,)."""
    return torch.where(there, values, 0.0).sum(1) / counts


def _labels(shard: ImageSet) -> Tensor:
    assert shard.labels is not None
    return shard.labels
