"""The contract of a property, and what it is measured on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fedkd.data.images import ImageSet
from fedkd.randomness import stream
from fedkd.training.properties.readers import BATCH, Kept, NotMeasured, Reader

Made = TypeVar("Made")

Parts = Callable[[], Iterator[Tensor]]
"""Gives images, batch by batch, the same at every call."""


@dataclass(frozen=True)
class Value:
    """What was measured of one network.

    Attributes:
        score: NaN where it is not defined.
        count: Images, or planes, that it is a mean over.
        parts: What it is made of.
    """

    score: float
    count: int
    parts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scene:
    """What networks are measured on, and what they have answered so far.

    Attributes:
        images: The images, with labels or without.
        seed: Of everything that is drawn.
        triplets: Planes through three images.
        groups: Number of each image's group, (N,); None: the classes.
        group_names: In the order of the numbers.
        marker: Class that a marker is asked for; None: none is.
    """

    images: ImageSet
    seed: int = 0
    triplets: int = 50
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    marker: int | None = None
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """Of the images. Raises `NotMeasured` if they have none."""
        if self.images.labels is None:
            raise NotMeasured("the images have no labels")
        return self.images.labels.cpu()

    @property
    def pixels(self) -> Tensor:
        """Floats in [0, 1], on the CPU."""
        return self.images.images.cpu().float().div(255)

    @property
    def rows(self) -> Tensor:
        """Numbers of the images."""
        return torch.arange(len(self.images))

    def stream(self, *names: object) -> torch.Generator:
        """A generator for a purpose."""
        return stream(self.seed, "property", *names)

    def kept(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What was made once under this key."""
        if key not in self._memo:
            self._memo[key] = make()
        found: Made = self._memo[key]
        return found

    def clean(self, who: Reader) -> Tensor:
        """Logits of the images as they are, (N, C)."""
        if isinstance(who, Kept):
            return who.answers
        images = self.images.images.cpu()
        return self.logits(who, "clean", lambda: iter(images.split(BATCH)), self.rows)

    def logits(self, who: Reader, view: object, parts: Parts, rows: Tensor) -> Tensor:
        """Logits of images that were made of these, (B, C); read once for each network.

        Args:
            who: Who is asked.
            view: Name of what was made.
            parts: The images.
            rows: What each was made of, as in `Reader.logits`.
        """

        def read() -> Tensor:
            if who.members:
                each = [self.logits(member, view, parts, rows) for member in who.members]
                return who.together(each, rows)  # type: ignore[attr-defined]
            found, start = [], 0
            with torch.no_grad():
                for batch in parts():
                    stop = start + len(batch)
                    found.append(who.logits(batch, rows[start:stop]))
                    start = stop
            return torch.cat(found)

        return self.kept((who, "logits", view), read)

    def of_view(self, who: Reader, view: object, make: Callable[[], Tensor]) -> Tensor:
        """Likewise of one image for each, all made at once by `make`."""
        return self.logits(who, view, lambda: iter(make().split(BATCH)), self.rows)

    def unmoved(
        self, who: Reader, what: str, views: Mapping[str, tuple[object, Callable[[], Tensor]]]
    ) -> Value:
        """Share of images whose class stays the same under views: the mean, and each.

        Args:
            who: The network.
            what: What changes the images.
            views: By their names, how much of it, and what makes one of each image.
        """
        clean = self.clean(who)
        parts = {
            name: same(clean, self.of_view(who, (what, much), make))
            for name, (much, make) in views.items()
        }
        return Value(mean([*parts.values()]), len(self.pixels), parts)

    def maps(self, who: Reader) -> Tensor:
        """Grad-CAM of the true classes, (N, h, w)."""
        images = self.images.images.cpu()
        return self.kept((who, "maps"), lambda: who.maps(images, self.labels))

    def pooled(self, who: Reader) -> Tensor:
        """What enters the classifier, (N, D)."""
        return self.kept((who, "pooled"), lambda: who.pooled(self.images.images.cpu()))


@dataclass(frozen=True, eq=False)
class Case:
    """Whom a network is compared with.

    Attributes:
        scene: The images.
        teacher: Whose properties are looked for; None: it is not there.
        why: Why it is not.
        reference: The independent student that began like the distilled one.
        gradients: Stands in for the teacher where its gradients or maps are needed.
        unrelated: A network that has taught nobody.
    """

    scene: Scene
    teacher: Reader | None
    reference: Reader | None = None
    gradients: Reader | None = None
    unrelated: Reader | None = None
    why: str = "there is no teacher"

    def taught(self) -> Reader:
        """The teacher. Raises `NotMeasured` if it is not there."""
        if self.teacher is None:
            raise NotMeasured(self.why)
        return self.teacher

    def looked_into(self) -> Reader:
        """The teacher, or who stands in for it where one has to look into it."""
        return self.taught() if self.gradients is None else self.gradients


class Property(ABC):
    """One property of a network, or likeness of two.

    Attributes:
        title: On pages.
        question: What it answers, a sentence for pages.
        likeness: Whether more is closer to the teacher. Else it is a network's own, and the teacher
            has a value too.
        chance: What a student that learnt nothing from the teacher has, if that is known.
        percent: Whether the score is a share.
        inside: Whether the teacher has to be looked into (gradients, maps).
    """

    title: ClassVar[str]
    question: ClassVar[str]
    likeness: ClassVar[bool] = True
    chance: ClassVar[float | None] = None
    percent: ClassVar[bool] = True
    inside: ClassVar[bool] = False

    @abstractmethod
    def measure(self, who: Reader, case: Case) -> Value:
        """The property of `who`. Raises `NotMeasured`."""


def same(first: Tensor, second: Tensor) -> float:
    """Share of rows of two (N, C) whose largest is the same class; NaN of none."""
    if len(first) == 0:
        return float("nan")
    return float((first.argmax(dim=1) == second.argmax(dim=1)).double().mean())


def mean(values: Sequence[float]) -> float:
    """Of at least one; NaN of none."""
    return sum(values) / len(values) if values else float("nan")
