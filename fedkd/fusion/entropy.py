"""Teachers count by how sure they are of a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("entropy")
class Entropy(Fusion):
    """A teacher's weight on a sample falls with the entropy of its prediction (EBKD).

    Weight exp(-H / (log C * temperature)), with H / log C in [0, 1]; C are the classes that the
    teacher knows. Under strong label skew a narrow teacher is sure of everything: chain it after
    `class_gated` there.

    Args:
        temperature: Small values listen to the surest teachers only.

    References:
        Kwon et al., "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020.
    """

    partial = True

    temperature: Positive = 0.2

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by entropy of the real view's prediction."""
        entropy = relative_entropy(ensemble)
        # Subtracting the surest teacher's entropy cancels in the normalisation and keeps
        # the exponentials away from zero.
        surest = entropy.min(dim=0).values
        return ensemble.weighted(torch.exp((surest - entropy) / self.temperature))


def relative_entropy(ensemble: Ensemble) -> Tensor:
    """Entropy of each teacher's prediction, as a share of the largest it can have, (M, B)."""
    log_p = torch.log_softmax(ensemble.logits, dim=-1)
    if (known := ensemble.known) is None:
        return -(log_p.exp() * log_p).sum(dim=-1) / math.log(log_p.shape[-1])
    surprise = torch.where(known[:, None], log_p.exp() * log_p, 0.0)
    return -surprise.sum(dim=-1) / known.sum(dim=1, keepdim=True).log()
