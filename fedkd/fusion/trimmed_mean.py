"""The mean of what the teachers say, without the extremes of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, merged
from fedkd.knowledge.payload import Ensemble


def trimmed(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """Weighted mean over the first axis without `share` of the weight at either end."""
    ordered, order = values.sort(dim=0)
    shares = weights[..., None].expand_as(values).gather(0, order)
    upto = shares.cumsum(dim=0)
    inside = torch.minimum(upto, torch.tensor(1 - share)) - (upto - shares).clamp(min=share)
    inside = inside.clamp(min=0)
    return (inside * ordered).sum(dim=0) / inside.sum(dim=0).clamp(min=1e-12)


@FUSIONS.register("trimmed_mean")
class TrimmedMean(Fusion):
    """The mean of each class's probability without its extremes, normalised.

    Args:
        share: Of the say, cut at either end; attackers below this share are bounded.

    References:
        Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018,
            https://arxiv.org/abs/1803.01498
    """

    def __init__(self, *, share: float = 0.3) -> None:
        if not 0 <= share < 0.5:
            raise ValueError(f"fusion 'trimmed_mean': share lies in [0, 0.5), got {share}")
        self.share = share

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher."""

        def combine(probabilities: Tensor, weights: Tensor) -> Tensor:
            middle = trimmed(probabilities, weights, self.share)
            total = middle.sum(dim=-1, keepdim=True)
            mean = torch.einsum("mb,mbc->bc", weights, probabilities)
            return torch.where(total > 1e-6, middle / total.clamp(min=1e-6), mean)

        return merged(ensemble, combine)
