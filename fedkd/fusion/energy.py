"""Teachers count by how much a sample looks like what they were trained on."""

from __future__ import annotations

import torch

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("energy")
class Energy(Fusion):
    """A teacher's weight grows with the log-sum-exp of its logits (low free energy).

    Reads the size of logits, so codecs that send only their differences (`int`, `topk`, `vote`)
    leave it nothing to read but certainty.

    Args:
        temperature: Small values listen to the teacher of the lowest energy only.

    References:
        Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020,
            https://arxiv.org/abs/2010.03759
    """

    temperature: Positive = 1.0

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by energy of the real view's logits."""
        score = torch.logsumexp(ensemble.logits.float(), dim=-1) / self.temperature
        # Teachers without weight must not set the scale.
        largest = torch.where(ensemble.weights > 0, score, -torch.inf).amax(dim=0)
        return ensemble.weighted(torch.exp((score - largest).clamp(max=0)))
