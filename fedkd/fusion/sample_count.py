"""Teachers count by how many examples they learnt from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble, Teacher


def believed_sizes(teachers: Sequence[Teacher], cap: float) -> Tensor:
    """The teachers' claimed numbers of examples, (M,), none above `cap` times the median."""
    counts = torch.tensor([float(teacher.num_examples or 0) for teacher in teachers])
    return counts.clamp(max=cap * float(counts.median().clamp(min=1)))


@FUSIONS.register("sample_count")
class SampleCount(Fusion):
    """A teacher's weight grows with its number of private examples (FedAvg's weighting).

    Counts are the clients' own claims, so no one is believed beyond `cap` times the median.

    Args:
        cap: Largest believed count, in multiples of the median count.
    """

    discloses = ("num_examples",)
    partial = True

    cap: Positive = 10.0

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights proportional to the capped counts."""
        believed = believed_sizes(ensemble.teachers, self.cap)
        return ensemble.weighted(believed[:, None].to(ensemble.weights).expand_as(ensemble.weights))
