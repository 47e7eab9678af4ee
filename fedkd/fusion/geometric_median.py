"""The point nearest to the answers of all teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.functional.options import Count
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, merged
from fedkd.knowledge.payload import Ensemble


def nearest_to_all(probabilities: Tensor, weights: Tensor, iterations: int = 32) -> Tensor:
    """Weighted geometric median over the first axis by Weiszfeld's iteration, (B, C)."""
    point = torch.einsum("mb,mbc->bc", weights, probabilities)
    for _ in range(iterations):
        gaps = (probabilities - point).norm(dim=-1).clamp(min=1e-6)
        pull = weights / gaps
        point = torch.einsum("mb,mbc->bc", pull / pull.sum(dim=0), probabilities)
    return point


@FUSIONS.register("geometric_median")
class GeometricMedian(Fusion):
    """The probabilities with the smallest weighted sum of distances to all teachers'.

    Stays bounded while less than half of the weight is an attacker's, whatever its direction.

    Args:
        iterations: Of Weiszfeld's algorithm.

    References:
        Pillutla et al., "Robust Aggregation for Federated Learning", IEEE TSP 2022,
            https://arxiv.org/abs/1912.13445
    """

    iterations: Count = 32

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher."""
        return merged(ensemble, lambda p, w: nearest_to_all(p, w, self.iterations))
