"""Teachers count by the classes they name, without sharing what they have seen."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.functional.options import NotNegative, Positive
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
        smoothing: Examples added to every count, as in `class_gated`.
        sharpness: Exponent of the vote, as in `class_gated`.
    """

    least: NotNegative = 0.05
    smoothing: Positive = 1.0
    sharpness: Positive = 1.0
    counts: Tensor | None = field(default=None, init=False)

    def fit(self, context: FitContext) -> Self:
        """Number of transfer images that each teacher takes for each class."""
        named = [
            one_hot(e.logits.argmax(dim=-1), e.logits.shape[-1]).sum(dim=1)
            for _, e in context.batches()
        ]
        counts = torch.stack(named).sum(dim=0).float()
        even = counts.sum(dim=1, keepdim=True) / counts.shape[1]
        ready = copy(self)
        ready.counts = torch.where(counts < self.least * even, 0.0, counts)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """As `class_gated`. Raises `RuntimeError` if the rule was not fitted."""
        counts = self.known(self.counts).to(ensemble.weights)
        return gate(ensemble, counts, self.smoothing, self.sharpness)
