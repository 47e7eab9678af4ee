"""DS-FL's entropy reduction."""

from __future__ import annotations

import torch

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, mean, merged
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("era")
class ERA(Fusion):
    """The mean of the probabilities, sharpened: `softmax(mean / temperature)`.

    The softmax is over probabilities, as published, not over their logarithms.

    Args:
        temperature: Below one sharpens; 0.1 is the authors'.

    References:
        Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
            Communication-Efficient Collaborative Training with Non-IID Private Data", IEEE TMC
            2021, https://arxiv.org/abs/2008.06180, Eq. 13
    """

    temperature: Positive = 0.1

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher."""
        return merged(ensemble, lambda p, w: torch.softmax(mean(p, w) / self.temperature, dim=-1))
