"""Teachers that stretch the spread of opinions are filtered out, sample by sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkd.functional.options import Minority
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("cronus")
class Cronus(Fusion):
    """Robust mean estimation by spectral filtering.

    Per sample, again and again: the direction in which opinions differ most is found, and
    teachers lose weight by how far out they are in it; the farthest loses all.

    Args:
        share: Of the teachers that may be attackers: so many rounds of filtering.

    References:
        Chang et al., "Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box
            Knowledge Transfer", 2019, https://arxiv.org/abs/1912.11279; filter: Diakonikolas et
            al., "Being Robust (in High Dimensions) Can Be Practical", ICML 2017.
    """

    share: Minority = 0.3

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights after filtering."""
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        weights = ensemble.weights.clone()
        for _ in range(math.ceil(self.share * len(ensemble))):
            weights = _filtered(probabilities, weights)
        return ensemble.weighted(torch.where(ensemble.weights > 0, weights / ensemble.weights, 0.0))


def _filtered(probabilities: Tensor, weights: Tensor) -> Tensor:
    """One round: (M, B, C), (M, B) -> (M, B), columns summing to one."""
    mean = torch.einsum("mb,mbc->bc", weights, probabilities)
    gaps = probabilities - mean
    spread = torch.einsum("mb,mbc,mbd->bcd", weights, gaps, gaps)
    directions = torch.linalg.eigh(spread).eigenvectors[..., -1]  # (B, C)
    out = torch.einsum("mbc,bc->mb", gaps, directions).square()
    out = torch.where(weights > 0, out, 0.0)
    farthest = out.amax(dim=0)
    kept = weights * (1 - out / farthest.clamp(min=1e-12))
    total = kept.sum(dim=0)
    # All of one opinion: nobody stands out, nobody loses.
    calm = (farthest < 1e-8) | (total < 1e-8)
    return torch.where(calm, weights, kept / total.clamp(min=1e-12))
