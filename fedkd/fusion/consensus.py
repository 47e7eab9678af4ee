"""Teachers that are far from what all say, over the whole transfer set, lose their say."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Evidence, Fusion
from fedkd.fusion.geometric_median import nearest_to_all
from fedkd.knowledge.payload import Ensemble


def distances(evidence: Evidence) -> Tensor:
    """How far each teacher is from the others, (M,): mean total variation to a robust centre.

    Weighted by the teacher's say: where the rules before give it none it may be wrong.
    """
    far: Tensor | float = 0.0
    say: Tensor | float = 0.0
    for _, ensemble in evidence.batches():
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        centre = nearest_to_all(probabilities, ensemble.weights)
        gaps = (probabilities - centre).abs().sum(dim=-1) / 2
        far = far + (ensemble.weights * gaps).sum(dim=1)
        say = say + ensemble.weights.sum(dim=1)
    assert isinstance(far, Tensor)
    assert isinstance(say, Tensor)
    return far / say.clamp(min=1e-12)


@FUSIONS.register("consensus")
class Consensus(Fusion):
    """Silences outliers among the teachers for the round.

    Every teacher's distance to the geometric median of all is compared with the other teachers'
    distances: who is more than `tolerance` robust deviations (1.4826 times the median absolute
    deviation) beyond the median has no say. Chained after rules that weigh (`density_ratio`), a
    teacher is judged only where it claims to know.

    Args:
        tolerance: In robust deviations.
        least: Smallest deviation believed, so that nearly identical teachers are not told apart.
    """

    def __init__(self, *, tolerance: float = 3.0, least: float = 0.05) -> None:
        if tolerance <= 0 or least <= 0:
            raise ValueError("fusion 'consensus': tolerance and least must be positive")
        self.tolerance = tolerance
        self.least = least
        self.heard: Tensor | None = None

    def fitted(self, evidence: Evidence) -> Self:
        """Who is heard."""
        far = distances(evidence)
        middle = far.quantile(0.5)
        spread = (1.4826 * (far - middle).abs().quantile(0.5)).clamp(min=self.least)
        ready = copy(self)
        ready.heard = (far <= middle + self.tolerance * spread).float()
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights of those who are heard."""
        if self.heard is None:
            raise RuntimeError(
                "fusion 'consensus' has to see the whole transfer set: use fit_rules"
            )
        return ensemble.weighted(self.heard.to(ensemble.weights)[:, None])
