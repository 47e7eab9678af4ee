"""The middle of the teachers' probabilities, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, mean, merged
from fedkd.knowledge.payload import Ensemble


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Median over the first axis: values (M, B, C), weights (M, B) summing to one.

    The mean of the lower and the upper median, which with equal weights is the usual one.
    """
    ordered, order = values.sort(dim=0)
    shares = weights[..., None].expand_as(values).gather(0, order)
    reached = shares.cumsum(dim=0)
    lower = (reached >= 0.5 - 1e-6).to(torch.uint8).argmax(dim=0, keepdim=True)
    upper = (reached > 0.5 + 1e-6).to(torch.uint8).argmax(dim=0, keepdim=True)
    return (ordered.gather(0, lower) + ordered.gather(0, upper))[0] / 2


@FUSIONS.register("median")
class Median(Fusion):
    """The weighted median of each class's probability, normalised.

    Less than half of the weight cannot move it beyond the others' answers. Under label skew the
    truth itself may lie with a minority: chain it after rules that weigh, or use `consensus`.

    References:
        Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018,
            https://arxiv.org/abs/1803.01498
    """

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher."""
        return merged(ensemble, central)


def central(probabilities: Tensor, weights: Tensor) -> Tensor:
    """Normalised medians (B, C); the mean where all medians are zero."""
    return normalised(weighted_median(probabilities, weights), probabilities, weights)


def normalised(middle: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
    """Robust means (B, C) made to sum to one; the plain mean where all are zero."""
    total = middle.sum(dim=-1, keepdim=True)
    return torch.where(total > 1e-6, middle / total.clamp(min=1e-6), mean(probabilities, weights))
