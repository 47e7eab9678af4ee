"""What the student is shown, batch by batch: images, the teachers' answers, targets.

Two sources, one loop. Federated, the teachers' knowledge about the transfer set lies in a bank
(`TransferBatches`). Centrally, the teachers are in the loop and answer to every augmented batch
anew (`OnlineBatches`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedkd.data.heads import Heads
from fedkd.data.images import ImageSet
from fedkd.data.views import Draws, augmented
from fedkd.knowledge.kinds import Kind, Logits, Reading, TeacherStatistic
from fedkd.knowledge.payload import Bank, Ensemble, Fused, Teacher, not_finite
from fedkd.models.network import Network, parameter_count
from fedkd.training.batches import Order, batches, positive, steps_per_epoch

# Samples of an example: enough for what losses measure on them (signs, margins).
EXAMPLE = 64
# Bytes of teachers' answers that are kept in memory instead of being read for every batch.
RESIDENT = 2**28

Views = Callable[[int], Tensor]
Statistics = MutableMapping[Network, dict[Kind, Tensor]]


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        images: uint8 (B, channels, h, w).
        virtual: View number -> the same images under that virtual view; None if there is none.
        ensemble: The teachers' answers about them.
        targets: Classes (B,), of a student with several heads (B, heads); or None.
    """

    images: Tensor
    virtual: Views | None
    ensemble: Ensemble
    targets: Tensor | None

    def rows(self, index: Tensor) -> Batch:
        """Some of its samples."""
        whole = self.virtual
        virtual = None if whole is None else lambda number: whole(number)[index]
        targets = None if self.targets is None else self.targets[index]
        return Batch(self.images[index], virtual, self.ensemble.rows(index), targets)

    def read(self, student: Network, kinds: Collection[Kind]) -> dict[Kind, Tensor]:
        """The student's side of it."""
        reading = Reading(student, self.images, self.virtual)
        return {kind: _read(kind, reading, "the student") for kind in kinds}


class BatchSource(Protocol):
    """A source of batches, the same for the same seed."""

    @property
    def samples(self) -> int:
        """Images."""

    @property
    def batch_size(self) -> int:
        """Samples per step."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""

    @property
    def obstacle(self) -> str | None:
        """Why making a batch cannot be captured as a graph; None if it can."""

    @property
    def generators(self) -> Iterable[torch.Generator]:
        """Those on the device that batches draw from."""

    def example(self) -> Batch:
        """A few samples, to fit losses to the shapes of student and teachers."""

    def order(self, number: int) -> Iterator[Tensor]:
        """Which images make the batches of epoch `number`, from 1; on the device."""

    def batch(self, index: Tensor, epoch: int, step: int) -> Batch:
        """One of them, made on the device."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch `number`, from 1."""


class _Images(ABC):
    """What both sources hold."""

    def __init__(
        self, images: Tensor, batch_size: int, seed: int, device: torch.device | str
    ) -> None:
        if len(images) == 0:
            raise ValueError("images: there is no image to learn from")
        self._images = images
        self.batch_size = positive(batch_size)
        self._order = Order(len(images), seed)
        self._device = torch.device(device)
        self._draws = Draws(seed, self._device)

    @property
    def samples(self) -> int:
        """Images."""
        return len(self._images)

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return steps_per_epoch(len(self._images), self.batch_size)

    @property
    def obstacle(self) -> str | None:
        """Why making a batch cannot be captured as a graph; None if it can."""
        return None

    @property
    def generators(self) -> Iterable[torch.Generator]:
        """Those of the augmentations."""
        return self._draws

    def order(self, number: int) -> Iterator[Tensor]:
        """Which images make the batches of epoch `number`, whose augmentations begin anew."""
        self._draws.begin(number)
        # All at once: a copy in every step would make an accelerator wait.
        yield from batches(self._order.epoch(number).to(self._device), self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """All images in an order of its own."""
        for step, index in enumerate(self.order(number)):
            yield self.batch(index, number, step)

    @abstractmethod
    def batch(self, index: Tensor, epoch: int, step: int) -> Batch:
        """One of the batches of an epoch, made on the device."""


class TransferBatches(_Images):
    """The transfer set with what the teachers have shared about it.

    Images, views and answers are put on the device once. Answers that do not fit there
    (`RESIDENT`) stay where the bank has them, and batches are read from it one by one.

    Args:
        images: Transfer images in their order, uint8 (N, channels, h, w).
        fused: The teachers' answers about them.
        views: View number -> all transfer images under that virtual view.
        augment: Recipe of the student's real view, a name in `fedkd.data.views.AUGMENTATIONS`.
            The teachers have answered about the image as it is.
        batch_size: Samples per step; a left-over batch of one is dropped (batch norm).
        seed: Seed of the order of samples and of the augmentation.
        device: Where batches are put.

    Raises:
        ValueError: `fused` is about another number of images, or is not finite.
    """

    def __init__(
        self,
        images: Tensor,
        fused: Fused,
        *,
        views: Views | None = None,
        augment: str = "none",
        batch_size: int = 64,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(images) != len(fused):
            raise ValueError(
                f"images: the teachers have answered about {len(fused)} images, here are "
                f"{len(images)}; those of fused.index belong to them"
            )
        super().__init__(images, batch_size, seed, device)
        if not fused.probabilities.isfinite().all():
            problem = not_finite(fused.bank.rows(torch.arange(len(fused)), kinds=(Logits(),)))
            raise ValueError(problem or "fused.probabilities are not finite")
        self._fused = fused
        self._views = views
        self._augment = augment
        self._seen: dict[int, Tensor] = {}
        self._pixels = images.to(self._device)
        self._targets = fused.targets.to(self._device)
        self._answers: Ensemble | None = None
        if _bytes(fused.bank) <= resident(self._device):
            self._answers = fused.bank.rows(torch.arange(len(fused)), self._device)

    @property
    def obstacle(self) -> str | None:
        """Answers that do not fit on the device."""
        return None if self._answers is not None else "the teachers' answers do not fit there"

    def example(self) -> Batch:
        """The first few transfer images."""
        return self.batch(torch.arange(min(EXAMPLE, len(self._images)), device=self._device), 0, 0)

    def batch(self, index: Tensor, epoch: int, step: int) -> Batch:
        """Some transfer images, augmented by a stream of their own for the student alone."""
        images = self._pixels[index]
        if self._augment != "none":
            images = augmented(images, self._augment, self._draws.of(epoch, step, "augment"))
        virtual = None if self._views is None else lambda number: self._view(number)[index]
        if self._answers is None:
            ensemble = self._fused.bank.rows(index, self._device)
        else:
            ensemble = self._answers.at(index)
        return Batch(images, virtual, ensemble, self._targets[index])

    def _view(self, number: int) -> Tensor:
        assert self._views is not None
        if number not in self._seen:
            view = self._views(number)
            if len(view) != len(self._images):
                raise ValueError(
                    f"views: view {number} has {len(view)} images, the real one {len(self._images)}"
                )
            self._seen[number] = view.to(self._device)
        return self._seen[number]


class OnlineBatches(_Images):
    """Images, augmented anew in every epoch, with the teachers in the loop.

    Images lie on the device and are augmented there. Without teachers this is plain supervised
    training. A teacher sees the very pixels that the student sees.

    Args:
        images: With labels, or without any: then the teachers name their classes.
        teachers: On `device`, in evaluation mode; not changed.
        kinds: What is read from them.
        augment: Recipe of the real view, a name in `fedkd.data.views.AUGMENTATIONS`.
        virtual: Recipe of the virtual view.
        batch_size: Samples per step; a left-over batch of one is dropped (batch norm).
        seed: Seed of order and augmentation.
        device: Where batches are put.
        weights: Weight of each teacher; default: all the same.
        autocast: Precision in which teachers compute, None for float32.
        memory_format: Layout of the images.
        known: Statistics of teachers about the same images; new ones are added.
        clean: Whether teachers see the images as they are, and the student alone the augmented.
        unlabelled: More images, uint8 (N, channels, h, w), whose classes the teachers name.
        others: For each teacher what it sees instead of `images`: the same samples as another
            modality shows them, uint8 (N, ...), augmented by draws of their own. None: the images.
        heads: Of a student with several: a batch's targets are then (B, heads).

    Raises:
        ValueError: a teacher has nothing of a kind, or there is none to name what is unlabelled.
    """

    def __init__(
        self,
        images: ImageSet,
        teachers: Sequence[Network] = (),
        kinds: Sequence[Kind] = (),
        *,
        augment: str = "none",
        virtual: str = "randaugment",
        batch_size: int = 64,
        seed: int = 0,
        device: torch.device | str = "cpu",
        weights: Sequence[float] | None = None,
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        known: Statistics | None = None,
        clean: bool = False,
        unlabelled: Tensor | None = None,
        others: Sequence[Tensor | None] = (),
        heads: Heads | None = None,
    ) -> None:
        if images.labels is None and not teachers:
            raise ValueError("central training needs labelled images, these have no labels")
        pixels, labels = images.images, images.labels
        if labels is None:
            labels = torch.full((len(images),), -1)
        if unlabelled is not None:
            if not teachers:
                raise ValueError("unlabelled: there is no teacher that names these images")
            pixels = torch.cat([pixels, unlabelled])
            labels = torch.cat([labels, labels.new_full((len(unlabelled),), -1)])
        super().__init__(pixels.to(device, memory_format=memory_format), batch_size, seed, device)
        labels = labels if heads is None else heads.targets(labels)
        self._labels = labels.to(self._device)
        self._named = unlabelled is not None or images.labels is None
        self._clean = clean
        self._teachers = teachers
        there: dict[int, Tensor] = {}  # teachers of one side share it
        self._others: list[Tensor | None] = []
        for other in others or [None] * len(teachers):
            if other is not None and id(other) not in there:
                there[id(other)] = other.to(device, memory_format=memory_format)
            self._others.append(None if other is None else there[id(other)])
        for number, other in enumerate(self._others):
            if other is not None and len(other) != len(images):
                raise ValueError(
                    f"others[{number}]: {len(other)} images beside {len(images)}: pairs need as "
                    "many on each side"
                )
        asked = (*kinds, Logits()) if self._named else kinds
        self._kinds = list(dict.fromkeys(kind for kind in asked if kind.per_sample))
        self._augment = augment
        self._virtual = virtual
        self._autocast = autocast
        self._memory_format = memory_format
        self._who = tuple(
            Teacher(number, parameters=parameter_count(teacher), knows=teacher.knows)
            for number, teacher in enumerate(teachers)
        ) or (Teacher(0),)
        self._places = [
            None
            if teacher.knows is None
            else torch.tensor(teacher.knows).nonzero()[:, 0].to(device)
            for teacher in teachers
        ]
        shares = torch.tensor(weights or [1.0] * len(self._who), device=self._device)
        self._weights = (shares / shares.sum())[:, None]
        known = WeakKeyDictionary() if known is None else known
        self._statistics: dict[Kind, Tensor | Sequence[Tensor]] = {
            kind: [
                self._statistic(kind, teacher, known, other)
                for teacher, other in zip(teachers, self._others, strict=True)
            ]
            for kind in kinds
            if isinstance(kind, TeacherStatistic)
        }

    def example(self) -> Batch:
        """The first few images."""
        count = min(EXAMPLE, len(self._images))
        return self.batch(torch.arange(count, device=self._device), 0, 0)

    @torch.no_grad()
    def _statistic(
        self, kind: TeacherStatistic, teacher: Network, known: Statistics, other: Tensor | None
    ) -> Tensor:
        """Computed once: some look at all images."""
        images = self._images if other is None else other
        found = known.setdefault(teacher, {})
        if kind not in found:
            labels = None if self._named else self._labels
            found[kind] = kind.state(teacher, images, labels).to(self._device)
        return found[kind]

    def batch(self, index: Tensor, epoch: int, step: int) -> Batch:
        """Some images, augmented by a stream of their own, and the teachers' answers to them."""
        pixels, labels = self._images[index], self._labels[index]
        images = self._augmented(pixels, self._augment, epoch, step, "augment")

        @cache
        def virtual(number: int) -> Tensor:
            return self._augmented(pixels, self._virtual, epoch, step, "virtual", number)

        shown = pixels if self._clean else images
        ensemble = self._ask(shown, virtual, index, epoch, step)
        if self._named:
            named = ensemble.mean_probabilities().argmax(dim=1)
            labels = torch.where(labels < 0, named, labels)
        return Batch(images, virtual, ensemble, labels)

    def _augmented(
        self, images: Tensor, recipe: str, epoch: int, step: int, *names: object
    ) -> Tensor:
        changed = augmented(images, recipe, self._draws.of(epoch, step, *names))
        return changed.contiguous(memory_format=self._memory_format)

    @torch.no_grad()
    def _ask(
        self, images: Tensor, virtual: Views, index: Tensor, epoch: int, step: int
    ) -> Ensemble:
        weights = self._weights.expand(-1, len(images))
        tensors = dict(self._statistics)
        readings = []
        shown: list[tuple[Tensor, Tensor]] = []  # the other sides, and how this batch shows them
        for teacher, other in zip(self._teachers, self._others, strict=True):
            if other is None:
                readings.append(Reading(teacher, images, virtual))
                continue
            seen = next((seen for side, seen in shown if side is other), None)
            if seen is None:
                names = ("augment", "side", len(shown))
                recipe = "none" if self._clean else self._augment
                seen = self._augmented(other[index], recipe, epoch, step, *names)
                shown.append((other, seen))
            readings.append(Reading(teacher, seen))
        for kind in self._kinds if readings else ():
            with torch.autocast(
                self._device.type, dtype=self._autocast, enabled=self._autocast is not None
            ):
                parts = [
                    _read(kind, reading, f"teacher {number}").float()
                    for number, reading in enumerate(readings)
                ]
            if kind.logits:
                parts = [self._widened(*each) for each in zip(self._who, self._places, parts)]
            same = len({part.shape for part in parts}) == 1
            if len(parts) == 1:
                tensors[kind] = parts[0][None]  # without a copy
            else:
                tensors[kind] = torch.stack(parts) if same else parts
        return Ensemble(self._who, tensors, weights)

    @staticmethod
    def _widened(who: Teacher, places: Tensor | None, logits: Tensor) -> Tensor:
        """As `Teacher.widened`, on the device."""
        if who.knows is None or places is None:
            return logits
        whole = logits.new_full((len(logits), len(who.knows)), -math.inf)
        return whole.index_copy_(1, places, logits)


def resident(device: torch.device) -> int:
    """Bytes of answers that are kept on a device."""
    if device.type != "cuda":
        return RESIDENT
    free, _ = torch.cuda.mem_get_info(device)
    return max(RESIDENT, int(free) // 4)


def _bytes(bank: Bank) -> int:
    """Of all its answers in float32."""
    return sum(4 * array.size for arrays in bank.arrays.values() for array in arrays)


def _read(kind: Kind, reading: Reading, who: str) -> Tensor:
    try:
        return kind.read(reading)
    except ValueError as error:
        raise ValueError(f"{kind} cannot be read from {who}: {error}") from None
