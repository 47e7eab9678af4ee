"""Interactive contrastive learning: the student's vectors among the teacher's."""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
from torch import Tensor, nn

from fedkd.functional.options import Positive
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Pooled
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, loss_function

# As in CLIP: a larger factor makes single pairs dominate.
MOST = 100.0


@loss_function("icl")
def icl_loss(
    student_vectors: Tensor,
    teacher_vectors: Tensor,
    scale: Tensor | float,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of finding one's own pair, both ways, (B, D) x (B, D) -> (B,).

    Half of what it costs to find the teacher's vector of each sample by the student's, and half
    of the other way round, among those of the batch.

    Args:
        student_vectors: (B, D), projected to the teacher's width; made unit vectors here.
        teacher_vectors: (B, D).
        scale: What cosines are multiplied by.
        weights: This teacher's weight on each sample, (B,): how far it counts among the others
            that it could be taken for; ones if None.
    """
    check_batch("icl", student_vectors, teacher_vectors, weights=weights)
    if student_vectors.shape != teacher_vectors.shape:
        raise ValueError(
            f"loss 'icl': the student's vectors are {tuple(student_vectors.shape)}, the teacher's "
            f"{tuple(teacher_vectors.shape)}: project them first"
        )
    ours = _unit(full(student_vectors))
    theirs = _unit(teacher_vectors.detach().to(ours.dtype))
    cosines = scale * (ours @ theirs.T)
    others = cosines.new_zeros(len(cosines))
    if weights is not None:
        total = weights.to(cosines).sum()
        even = torch.ones_like(others)
        others = torch.where(total > 0, weights * len(weights) / total.clamp(min=1e-30), even).log()
    found = torch.logsumexp(cosines + others, dim=1) + torch.logsumexp(cosines.T + others, dim=1)
    return found / 2 - cosines.diagonal()


@LOSSES.register("icl")
class ICLLoss(DistillationLoss, formula=icl_loss):
    """Puts each of the student's vectors next to the teacher's of the same sample.

    Made for pairs of two modalities: nothing but the pairing is compared. A linear layer brings the
    student's vector to the teacher's width; it and the scale are trained along.

    Args:
        temperature: One over the scale that training begins with; the scale stays at most 100.

    References:
        Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation", CVPR 2024,
            https://arxiv.org/abs/2307.12732
    """

    needs = (Pooled(),)

    def __init__(self, *, temperature: Positive = 0.07) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.projection: nn.Module = nn.Identity()

    def adapted(self, student: Tensors, teacher: Tensors) -> Self:
        """With a projection from the student's width to the teacher's."""
        ready = copy.deepcopy(self)
        ready.projection = nn.Linear(student[Pooled()].shape[1], teacher[Pooled()].shape[1])
        return ready

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        ours = student[Pooled()].to(self.log_scale.dtype)
        scale = self.log_scale.exp().clamp(max=MOST)
        theirs = teacher[Pooled()]
        return icl_loss(self.projection(ours), theirs, scale, weights=weights.samples)


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays, without a slope."""
    squares = vectors.square().sum(dim=1, keepdim=True)
    there = ~(squares <= torch.finfo(vectors.dtype).tiny)  # what is NaN stays NaN
    lengths = torch.where(there, squares, 1.0).sqrt()
    return torch.where(there, vectors / lengths, 0.0)
