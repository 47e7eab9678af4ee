"""Teachers count by how alike they see the transfer set."""

from __future__ import annotations

from copy import copy
from typing import Literal, Self

import torch
from torch import Tensor

from fedkd.functional.similarity import linear_cka
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("cka_alignment")
class CKAAlignment(Fusion):
    """A teacher's say grows with the CKA between its logits and those of the others.

    CKA compares how samples relate to each other, so teachers who name classes differently but see
    the same groups still agree.

    Args:
        to: `others` (mean over all other teachers) or `student` (as it was before the round).
        power: Larger values listen to the best aligned only.

    References:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
            https://arxiv.org/abs/1905.00414; the weighting is ours.
    """

    def __init__(self, *, to: Literal["others", "student"] = "others", power: float = 2.0) -> None:
        if to not in ("others", "student"):
            raise ValueError(f"fusion 'cka_alignment': to is 'others' or 'student', got {to!r}")
        if power < 0:
            raise ValueError(f"fusion 'cka_alignment': power must not be negative, got {power}")
        self.to = to
        self.power = power
        self.needs_student = to == "student"
        self.scores: Tensor | None = None

    def fitted(self, evidence: FitContext) -> Self:
        """CKA of every teacher over the whole transfer set."""
        logits = torch.cat([e.logits.float() for _, e in evidence.batches()], dim=1)
        teachers = range(len(logits))
        if self.to == "student":
            if evidence.student is None:
                raise ValueError("fusion 'cka_alignment': there is no student to align to")
            told = evidence.student.float()
            scores = torch.stack([linear_cka(logits[m], told) for m in teachers])
        else:
            alike = torch.eye(len(logits))
            for one in teachers:
                for two in range(one):
                    alike[one, two] = alike[two, one] = linear_cka(logits[one], logits[two])
            others = max(len(logits) - 1, 1)
            scores = (alike.sum(dim=1) - 1) / others if len(logits) > 1 else torch.ones(1)
        ready = copy(self)
        ready.scores = scores.clamp(min=0).pow(self.power)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """The same weights for every sample."""
        if self.scores is None:
            raise RuntimeError(
                "fusion 'cka_alignment' has to see the whole transfer set: use fit_rules"
            )
        return ensemble.weighted(self.scores.to(ensemble.weights)[:, None])
