"""Teachers count by the classes they name, without telling what they have seen."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.fusion.class_gated import gate
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("coverage")
class Coverage(Fusion):
    """`class_gated` with class counts guessed from the teacher's own answers.

    A teacher that never saw a class hardly ever names it. How often it names each class among all
    transfer images stands in for how many examples it has; nothing is disclosed beyond the
    answers. A class named by less than `least` of an even share counts as never seen.

    Args:
        least: Of an even share of the transfer images.
        smoothing: See `class_gated`.
        sharpness: See `class_gated`.
    """

    def __init__(
        self, *, least: float = 0.05, smoothing: float = 1.0, sharpness: float = 1.0
    ) -> None:
        if least < 0 or smoothing <= 0 or sharpness <= 0:
            raise ValueError(
                "fusion 'coverage': least must not be negative, smoothing and sharpness positive"
            )
        self.least = least
        self.smoothing = smoothing
        self.sharpness = sharpness
        self.counts: Tensor | None = None

    def fitted(self, evidence: FitContext) -> Self:
        """Number of transfer images that each teacher takes for each class."""
        counts = torch.stack(
            [
                one_hot(e.logits.argmax(dim=-1), e.logits.shape[-1]).sum(dim=1)
                for _, e in evidence.batches()
            ]
        ).sum(dim=0)
        counts = counts.float()
        even = counts.sum(dim=1, keepdim=True) / counts.shape[1]
        ready = copy(self)
        ready.counts = torch.where(counts < self.least * even, 0.0, counts)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """As `class_gated`. Raises `RuntimeError` if the rule was not fitted."""
        if self.counts is None:
            raise RuntimeError("fusion 'coverage' has to see the whole transfer set: use fit_rules")
        return gate(ensemble, self.counts.to(ensemble.weights), self.smoothing, self.sharpness)
