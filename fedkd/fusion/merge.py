"""All teachers become one."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, merged
from fedkd.knowledge.payload import Ensemble


def mean(probabilities: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over teachers: (M, B, C), (M, B) -> (B, C)."""
    return torch.einsum("mb,mbc->bc", weights, probabilities)


@FUSIONS.register("merge")
class Merge(Fusion):
    """One teacher that says the weighted mean of all.

    What the student learns from single predictions stays the same; losses that compare relations
    then cost one teacher's graph instead of each one's, and see the graph of the mean.
    """

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher."""
        return merged(ensemble, mean)
