"""The one container for pictures: an in-memory set of 8-bit images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedkd.data.labels import check_range, class_names, label_numbers, listed


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
    if low < 0:
        return (
            f" from {low:.3g} to {high:.3g}; if they are normalised, give them as they were "
            "before: the networks normalise themselves"
        )
    return ""


def class_map(classes: tuple[str, ...]) -> str:
    """Hash of the class names in order; two machines with the same map mean the same classes."""
    return hashlib.sha256("\x00".join(classes).encode()).hexdigest()[:16]
