"""Features that public images alone decide: what private images are, they do not show."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

# Directions along which images hardly differ are not blown up to the length of the others: this
# share of the largest variance is added to each.
_RIDGE = 0.1

# More images show the directions no better, and cost memory.
_ENOUGH = 5000

T = TypeVar("T")

_known: OrderedDict[Hashable, Any] = OrderedDict()


@dataclass(frozen=True)
class Basis:
    """Principal directions of what public images give, whitened.

    Attributes:
        centre: Mean of the public images' numbers, (D,).
        axes: (D, K): directions of largest variance, divided by their deviation.
    """

    centre: Tensor
    axes: Tensor

    @classmethod
    def of(cls, numbers: Tensor, directions: int, ridge: float = _RIDGE) -> Self:
        """Of public images' numbers, (N, D): their pixels, or what was read of them.

        Raises:
            ValueError: there are not so many directions.
        """
        numbers = numbers.cpu().double()
        most = min(len(numbers) - 1, numbers.shape[1])
        if not 1 <= directions <= most:
            raise ValueError(
                f"directions: {len(numbers)} public images of {numbers.shape[1]} numbers have at "
                f"most {most}, got {directions}"
            )
        centre = numbers.mean(dim=0)
        variances, axes = _principal(numbers - centre, directions)
        scale = (variances + ridge * variances[0]).clamp(min=1e-12).rsqrt()
        return cls(centre.float(), (axes * scale).float())

    def __call__(self, images: Tensor) -> Tensor:
        """Features of length one, uint8 (N, channels, height, width) -> (N, K)."""
        return unit_features(images.flatten(1).float() / 255, self.centre, self.axes)


def unit_features(numbers: Tensor, centre: Tensor, axes: Tensor) -> Tensor:
    """(B, D) along the axes (D, K), then brought to length one: (B, K)."""
    features = (numbers - centre) @ axes
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-6)


def basis_of(images: Tensor, directions: int) -> Basis:
    """Of the pixels of public images, uint8 (N, channels, height, width), taken as 0 to 1."""

    def make() -> Basis:
        return Basis.of(images[:_ENOUGH].flatten(1).cpu().double() / 255, directions)

    return shown_by(images, ("pixels", directions), make)


def shown_by(images: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """What public images show; the last few are kept, since every client's network asks again.

    Args:
        images: The images.
        what: Names it.
        make: Finds it out.
    """
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy().tobytes())
    key = (digest.hexdigest(), what)
    if key not in _known:
        _known[key] = make()
        if len(_known) > 8:
            _known.popitem(last=False)
    found: T = _known[key]
    return found


def _principal(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest variances (K,) and their directions (D, K), of (N, D)."""
    samples, width = centred.shape
    if samples >= width:
        values, vectors = torch.linalg.eigh(centred.T @ centred / samples)
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    else:
        values, vectors = torch.linalg.eigh(centred @ centred.T / samples)
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        vectors = centred.T @ vectors
        vectors = vectors / vectors.norm(dim=0).clamp(min=1e-12)
    # Of each direction either sign will do: the one in which its largest number is positive.
    largest = vectors.abs().argmax(dim=0)
    return values, vectors * vectors.gather(0, largest[None]).sign()
