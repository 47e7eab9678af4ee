"""The one container for pictures: an in-memory set of 8-bit images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with optional labels.

    Attributes:
        images: uint8 (N, channels, height, width).
        labels: int64 (N,), or None for an unlabelled set.
        classes: Class names in label order; its length is the number of classes.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 (N, channels, height, width), got {self.images.dtype} "
                f"{tuple(self.images.shape)}"
            )
        if self.labels is None:
            return
        if self.labels.shape != (len(self.images),):
            raise ValueError(f"{len(self.images)} images but labels {tuple(self.labels.shape)}")
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(
            self.classes
        ):
            raise ValueError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"but there are {len(self.classes)} classes"
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
        return replace(self, images=self.images[rows], labels=labels)

    def unlabelled(self) -> ImageSet:
        """The same images without their labels."""
        return replace(self, labels=None)

    def class_counts(self) -> Tensor:
        """Examples per class, int64 (C,). Raises `ValueError` if the set is unlabelled."""
        if self.labels is None:
            raise ValueError("an unlabelled set has no class counts")
        return torch.bincount(self.labels, minlength=len(self.classes))

    def fingerprint(self) -> str:
        """Hash of pixels and order (not of labels): equal on two machines iff the images are."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
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


def class_map(classes: tuple[str, ...]) -> str:
    """Hash of the class names in order; two machines with the same map mean the same classes."""
    return hashlib.sha256("\x00".join(classes).encode()).hexdigest()[:16]
