"""How images are made fit for a network that was published for others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preparation:
    """What a published model expects of its images.

    Attributes:
        side: Height and width.
        mean: Per-channel mean of the pixels in [0, 1].
        std: Per-channel standard deviation of the pixels in [0, 1].
    """

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
