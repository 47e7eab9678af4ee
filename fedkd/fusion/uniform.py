"""Every teacher has the same weight."""

from __future__ import annotations

import torch

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("uniform")
class Uniform(Fusion):
    """Every teacher has the same weight (AVER; FedMD, DS-FL)."""

    partial = True

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights 1/M among the teachers that still have any."""
        return ensemble.weighted(torch.ones_like(ensemble.weights))
