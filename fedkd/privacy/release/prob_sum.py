"""The sum of the teachers' probabilities, under noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release import RELEASES
from fedkd.privacy.release.base import GRID, Release, Released, noisy_sum


@RELEASES.register("prob_sum")
@dataclass(kw_only=True, eq=False)
class ProbSum(Release):
    """Soft labels: probability vectors summed, noised, and turned into probabilities again.

    A probability vector has length at most one, so nothing is clipped. Raw noisy sums have
    negative entries on which a student memorises noise; the softmax of `sharpness` times their
    mean does not (post-processing, free).

    Args:
        epsilon: See `Release`; so are `delta`, `queries`, `cells`, `unit` and `secure`.
        sharpness: Inverse temperature of that softmax.
        min_clients: Fewer teachers are refused: the noise does not shrink with them.

    References:
        Example-level: the noisy sum of Papernot et al. 2018 with soft votes. Client-level: the
            aggregation of DS-FL (Itahara et al., https://arxiv.org/abs/2008.06180) under noise.
    """

    additive: ClassVar[bool] = True

    sharpness: float = 8.0
    min_clients: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpness <= 0:
            raise ValueError("release 'prob_sum': sharpness must be positive")

    def __call__(
        self, probabilities: Tensor, index: Tensor, rounds: int, noise: SecureGenerator
    ) -> Released:
        """Probabilities. Raises `ValueError` for too few teachers."""
        teachers = len(probabilities)
        if teachers < self.min_clients:
            raise ValueError(
                f"release: {teachers} teachers answered, at least {self.min_clients} are needed "
                "for a sum that is worth its noise (release.min_clients)"
            )
        # Each teacher's answer is rounded, not only the sum.
        total = (probabilities.double() / GRID).round().sum(dim=0) * GRID
        wider = self.wider(probabilities.shape[2], GRID)
        sigma = self.deviation(len(index), rounds) * wider
        noisy = noisy_sum(total, sigma, noise)
        mu = self.sensitivity * wider * math.sqrt(len(index)) / sigma
        return Released(self.scores(noisy, teachers), index, mu)

    def contributions(self, probabilities: Tensor) -> Tensor:
        """The probabilities."""
        return probabilities.double()

    def scores(self, noisy: Tensor, teachers: int) -> Tensor:
        """A softmax of their mean."""
        return torch.softmax(self.sharpness * noisy / teachers, dim=1).float()
