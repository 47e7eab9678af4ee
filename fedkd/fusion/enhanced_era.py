"""SCARLET's entropy reduction."""

from __future__ import annotations

from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, mean, merged
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("enhanced_era")
class EnhancedERA(Fusion):
    """The mean of the probabilities, raised to a power and normalised.

    Unlike `era` it leaves the mean as it is at `beta` one, and certainty stays certainty.

    Args:
        beta: Above one sharpens, below one flattens.

    References:
        Azuma et al., "Soft-Label Caching and Sharpening for Communication-Efficient Federated
            Distillation" (SCARLET), 2025, https://arxiv.org/abs/2504.19602
    """

    beta: Positive = 1.5

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher."""

        def sharpened(probabilities: Tensor, weights: Tensor) -> Tensor:
            powers = mean(probabilities, weights).clamp(min=1e-12).pow(self.beta)
            return powers / powers.sum(dim=-1, keepdim=True)

        return merged(ensemble, sharpened)
