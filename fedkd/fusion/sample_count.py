"""Teachers count by how many examples they learnt from."""

from __future__ import annotations

import torch

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("sample_count")
class SampleCount(Fusion):
    """A teacher's say grows with its number of private examples (FedAvg's weighting).

    Counts are the clients' own claims, so no one is believed beyond `cap` times the median.

    Args:
        cap: Largest believed count, in multiples of the median count.
    """

    discloses = ("num_examples",)

    def __init__(self, *, cap: float = 10.0) -> None:
        if cap <= 0:
            raise ValueError(f"fusion 'sample_count': cap must be positive, got {cap}")
        self.cap = cap

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights proportional to the capped counts."""
        counts = torch.tensor([float(t.num_examples or 0) for t in ensemble.teachers])
        believed = counts.clamp(max=self.cap * float(counts.median().clamp(min=1)))
        return ensemble.weighted(believed[:, None].to(ensemble.weights).expand_as(ensemble.weights))
