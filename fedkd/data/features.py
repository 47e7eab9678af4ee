"""Features that public images alone decide: what private images are, they do not show."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Directions along which images hardly differ are not blown up to the length of the others: this
# share of the largest variance is added to each.
_RIDGE = 0.1

# More images show the directions no better, and cost memory.
_ENOUGH = 5000

_known: OrderedDict[tuple[str, int], Basis] = OrderedDict()


@dataclass(frozen=True)
class Basis:
    """Principal directions of public images, whitened.

    Attributes:
        centre: Mean of the public images, (D,).
        axes: (D, K): directions of largest variance, divided by their deviation.
    """

    centre: Tensor
    axes: Tensor

    @classmethod
    def of(cls, images: Tensor, directions: int) -> Self:
        """Of public images, uint8 (N, channels, height, width), their pixels taken as 0 to 1.

        Raises:
            ValueError: there are not so many directions.
        """
        pixels = images[:_ENOUGH].flatten(1).cpu().double() / 255
        most = min(len(pixels) - 1, pixels.shape[1])
        if not 1 <= directions <= most:
            raise ValueError(
                f"directions: {len(pixels)} public images of {pixels.shape[1]} numbers have at "
                f"most {most}, got {directions}"
            )
        centre = pixels.mean(dim=0)
        variances, axes = _principal(pixels - centre, directions)
        scale = (variances + _RIDGE * variances[0]).clamp(min=1e-12).rsqrt()
        return cls(centre.float(), (axes * scale).float())

    def __call__(self, images: Tensor) -> Tensor:
        """Features of length one, uint8 (N, channels, height, width) -> (N, K)."""
        return unit_features(images.flatten(1).float() / 255, self.centre, self.axes)


def unit_features(pixels: Tensor, centre: Tensor, axes: Tensor) -> Tensor:
    """(B, D) along the axes (D, K), then brought to length one: (B, K)."""
    features = (pixels - centre) @ axes
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-6)


def basis_of(images: Tensor, directions: int) -> Basis:
    """As `Basis.of`; the last few are kept, since the network of every client asks for its own."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy().tobytes())
    key = (digest.hexdigest(), directions)
    if key not in _known:
        _known[key] = Basis.of(images, directions)
        if len(_known) > 4:
            _known.popitem(last=False)
    return _known[key]


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
