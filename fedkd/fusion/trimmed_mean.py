"""The mean of the teachers' probabilities, without the extremes of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.functional.options import Minority
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, merged
from fedkd.fusion.median import normalised
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
        share: Of the weight, cut at either end; attackers below this share are bounded.

    References:
        Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018,
            https://arxiv.org/abs/1803.01498
    """

    share: Minority = 0.3

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher."""

        def combine(probabilities: Tensor, weights: Tensor) -> Tensor:
            middle = trimmed(probabilities, weights, self.share)
            return normalised(middle, probabilities, weights)

        return merged(ensemble, combine)
