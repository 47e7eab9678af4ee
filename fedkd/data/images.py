"""The one container for pictures: an in-memory set of 8-bit images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.data.convert import Reading, convert, declared_names
from fedkd.data.labels import check_range, class_names, label_numbers, listed
from fedkd.io.text import nearest

Classes = Mapping[str | int, str] | Sequence[str | int] | None
"""Some classes of a data set, by name or number, or a mapping from them to new names."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with optional labels.

    NumPy arrays, lists of labels or names, and labels of other whole-number types are converted.

    Attributes:
        images: uint8 (N, channels, height, width).
        labels: int64 (N,), or None for an unlabelled set.
        classes: Class names in label order; its length is the number of classes.
        true_labels: The labels before noise was put on them, to measure by and for nothing else;
            None where `labels` are the true ones.
        groups: int64 (N,), where each image comes from (a speaker, a hospital); None if unknown.

    Raises:
        ValueError: anything else; the message names the argument and the way to convert it.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    true_labels: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        # The dataclass is frozen, and what is stored is what the types above promise.
        object.__setattr__(self, "images", _pixels(self.images))
        object.__setattr__(self, "classes", class_names(self.classes))
        if self.groups is not None and self.groups.shape != (len(self.images),):
            raise ValueError(f"{len(self.images)} images but groups {tuple(self.groups.shape)}")
        if self.labels is None:
            return
        object.__setattr__(self, "labels", label_numbers(self.labels))
        if self.labels.shape != (len(self.images),):
            raise ValueError(f"{len(self.images)} images but labels {tuple(self.labels.shape)}")
        check_range(self.labels, self.classes)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        labels: Any = None,
        *,
        names: Sequence[str] | None = None,
        classes: Classes = None,
        image: str | int | None = None,
        label: str | int | None = None,
        size: int | None = None,
        grey: bool | None = None,
        layout: str | None = None,
        range: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        skip_unreadable: bool = False,
    ) -> ImageSet:
        """Read a torch Dataset, a Hugging Face Dataset or arrays, whole, as 8-bit pictures.

        Args:
            dataset: A map-style torch or torchvision Dataset of (picture, label), a Hugging Face
                Dataset, an array or tensor of pictures in any layout, or (pictures, labels). A
                picture is a `PIL.Image`, a tensor, an array, or the content of a file.
            labels: Of an array of pictures; a data set has its own.
            names: Class names in label order; None: those that the data set declares, else its
                labels.
            classes: Which classes are kept, by name or number; or a mapping from them to new
                names, where two may become one. None: all.
            image: Column, key or place of the picture in an item; None: found by its type or name.
            label: Likewise of the label.
            size: Height and width to which pictures are resized, without regard to their aspect
                ratio; None: they are square and of one size.
            grey: One channel, or three; None: as the pictures have.
            layout: `CHW` or `HWC`, where the shape of an array does not tell.
            range: Black and white of pixels that are not uint8: (0, 1), (-1, 1), (0, 65535), ...
                Floats that fill 0 to 1 need none.
            mean: Per channel, what a normalisation has subtracted, to undo it.
            std: Per channel, what it has divided by.
            skip_unreadable: Leave pictures out that cannot be read, and warn with their number.

        Raises:
            ValueError: what cannot be understood; the message names the item or the argument, and
                the remedy.
        """
        reading = Reading(layout, range, mean, std, size, grey)
        if isinstance(dataset, ImageSet):
            if labels is not None or reading != Reading():
                raise ValueError(
                    "dataset: an ImageSet is read already: only classes may be given with it"
                )
            return dataset.only(classes)
        found = convert(
            dataset,
            labels,
            reading,
            names=names,
            image=image,
            label=label,
            skip_unreadable=skip_unreadable,
        )
        if not found.classes:
            raise ValueError(
                "names: there are neither labels nor class names; give the labels, or names=(...)"
            )
        return cls(found.images, found.labels, found.classes).only(classes)

    def only(self, classes: Classes) -> ImageSet:
        """The images of some classes, which are counted anew.

        Args:
            classes: Names or numbers of those that stay, in their new order; or a mapping from
                them to new names, where several may become one. None: all.

        Raises:
            ValueError: there is no such class, it is named twice, or there are no labels.
        """
        if classes is None:
            return self
        if self.labels is None:
            raise ValueError("classes: the images have no labels to choose by")
        chosen = dict(classes) if isinstance(classes, Mapping) else dict.fromkeys(classes)
        if len(chosen) < len(classes) or not chosen:
            raise ValueError(f"classes: expected different ones, got {list(classes)}")
        place = torch.full((len(self.classes),), -1)
        names: list[str] = []
        for old, new in chosen.items():
            row = self._place(old)
            if place[row] >= 0:
                raise ValueError(f"classes: {self.classes[row]!r} is named twice")
            name = self.classes[row] if new is None else str(new)
            if name not in names:
                names.append(name)
            place[row] = names.index(name)
        kept = self.subset((place[self.labels] >= 0).nonzero().flatten())
        assert kept.labels is not None
        true = None if kept.true_labels is None else place[kept.true_labels]
        return replace(kept, labels=place[kept.labels], classes=tuple(names), true_labels=true)

    @property
    def _numbers(self) -> range:
        return range(len(self.classes))

    def _place(self, name: str | int) -> int:
        """The number of a class. Raises `ValueError`."""
        if isinstance(name, str) and name in self.classes:
            return self.classes.index(name)
        number = int(name) if isinstance(name, str) and name.isdecimal() else name  # keys of YAML
        if isinstance(number, int) and not isinstance(number, bool) and number in self._numbers:
            return number
        hint = nearest(name, list(self.classes)) if isinstance(name, str) else ""
        raise ValueError(
            f"classes: there is no class {name!r}{hint}; there are {listed(self.classes)} "
            f"(0 to {len(self.classes) - 1})"
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def side(self) -> int:
        """Height and width of every image. Raises `ValueError` if they differ."""
        _, height, width = self.shape
        if height != width:
            raise ValueError(
                f"images are {height}x{width}, networks here take square ones: crop or pad them"
            )
        return height

    def subset(self, indices: Tensor | np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[rows]
        true = None if self.true_labels is None else self.true_labels[rows]
        groups = None if self.groups is None else self.groups[rows]
        return replace(
            self, images=self.images[rows], labels=labels, true_labels=true, groups=groups
        )

    def among(self, knows: Sequence[bool] | None, what: str = "images") -> ImageSet:
        """The same images, labelled by place among the classes that somebody knows.

        Args:
            knows: Which of the classes, (C,); None: all.
            what: Names the images in errors.

        Raises:
            ValueError: an image is of another class.
        """
        if knows is None or self.labels is None:
            return self
        place = torch.tensor(knows).cumsum(0) - 1
        place[~torch.tensor(knows)] = -1
        labels = place[self.labels]
        own = tuple(name for name, known in zip(self.classes, knows, strict=True) if known)
        if (labels < 0).any():
            strange = self.classes[int(self.labels[labels < 0][0])]
            raise ValueError(
                f"{what}: {int((labels < 0).sum())} images are of other classes than "
                f"{listed(own)}, the first of {strange!r}"
            )
        true = None if self.true_labels is None else place[self.true_labels]
        return replace(self, labels=labels, classes=own, true_labels=true)

    def unlabelled(self) -> ImageSet:
        """The same images without their labels."""
        return replace(self, labels=None, true_labels=None)

    def class_counts(self) -> Tensor:
        """Examples per class, int64 (C,). Raises `ValueError` if the set is unlabelled."""
        if self.labels is None:
            raise ValueError("an unlabelled set has no class counts")
        return torch.bincount(self.labels, minlength=len(self.classes))

    @property
    def wrong_labels(self) -> float | None:
        """Share of the labels that noise has made wrong; None where there was no noise."""
        if self.labels is None or self.true_labels is None or not len(self):
            return None
        return float((self.labels != self.true_labels).double().mean())

    def fingerprint(self) -> str:
        """Hash of pixels and order (not of labels): equal on two machines iff the images are."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and standard deviation of the pixels scaled to [0, 1]."""
        channels = self.images.shape[1]
        total = torch.zeros(channels, dtype=torch.double)
        squares = torch.zeros(channels, dtype=torch.double)
        for part in self.images.split(1000):  # a float copy of the whole set is eight times it
            pixels = part.double().div(255)
            total += pixels.sum(dim=(0, 2, 3))
            squares += pixels.square().sum(dim=(0, 2, 3))
        count = max(self.images[:, 0].numel(), 1)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
        return tuple(mean.tolist()), tuple(std.tolist())


def as_image_set(name: str, given: object, like: ImageSet | None = None) -> ImageSet:
    """An image set, or one made of another library's data set.

    Args:
        name: Name of the argument, for messages.
        given: What was given.
        like: Whose class names count, if the data set declares none.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(given, ImageSet):
        return given
    if isinstance(given, tuple | list) and any(isinstance(each, ImageSet) for each in given):
        raise ValueError(
            f"{name}: expected an ImageSet, got a {type(given).__name__} of them; "
            "load_dataset gives a pair, (train, test)"
        )
    if given is None:
        raise ValueError(f"{name}: expected an ImageSet or another data set, got NoneType")
    try:
        names = None if like is None or declared_names(given) else like.classes
        return ImageSet.from_dataset(given, names=names)
    except ValueError as error:
        text = str(error).removeprefix("dataset: ")
        raise ValueError(
            f"{name}: {text} (these are arguments of fedkd.ImageSet.from_dataset)"
            if "=" in text
            else f"{name}: {text}"
        ) from None


def _pixels(images: object) -> Tensor:
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "biufc" or images.dtype.byteorder == ">":
            raise ValueError(
                f"images must be uint8 (N, channels, height, width), got {images.dtype}"
            )
        images = torch.from_numpy(images.copy())  # of one's own, and never negative strides
    if not isinstance(images, Tensor):
        raise ValueError(
            "images must be a tensor or array, uint8 (N, channels, height, width), got "
            f"{type(images).__name__}"
        )
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 (N, channels, height, width), got {images.dtype} {shape}"
            f"{_mend(images)}"
        )
    if 0 in shape[1:]:
        raise ValueError(f"images must have at least one channel and one pixel, got {shape}")
    if shape[1] not in (1, 3) and shape[3] in (1, 3):
        raise ValueError(
            f"images must be uint8 (N, channels, height, width), got {shape}, which looks like "
            "channels last; turn them with images.permute(0, 3, 1, 2)"
        )
    return images


def _mend(images: Tensor) -> str:
    if images.dtype == torch.uint8 and images.ndim == 3:
        return "; one grey channel is images[:, None]"
    if not images.is_floating_point() or not images.numel():
        return ""
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high <= 1:
        return "; from 0 to 1 they become so with (images * 255).round().to(torch.uint8)"
    return (
        f" from {low:.3g} to {high:.3g}; fedkd.ImageSet.from_dataset reads them with range=... or, "
        "if they are normalised, mean=..., std=..."
    )


def class_map(classes: tuple[str, ...]) -> str:
    """Hash of the class names in order; two machines with the same map mean the same classes."""
    return hashlib.sha256("\x00".join(classes).encode()).hexdigest()[:16]
