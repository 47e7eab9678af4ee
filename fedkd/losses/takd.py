"""Distillation step by step: each assistant learns from the next larger one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble
from fedkd.losses import LOSSES
from fedkd.losses.base import EnsembleLoss, Tensors
from fedkd.losses.dgkd import Reduction
from fedkd.losses.divergence import check_teachers, kl_to_teachers, prior, reweighted
from fedkd.losses.inputs import loss_function
from fedkd.losses.kd import comparable


@loss_function("takd")
def takd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sizes: Sequence[int | None] | None = None,
    *,
    weights: Tensor | None = None,
    temperature: Positive = 5.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """T^2 * KL(smallest teacher || student) per sample -> (B,); the mean of it if several are.

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        sizes: Each teacher's number of parameters; all count as equal if one is unknown.
        weights: Weight of each teacher on each sample, (M, B); None means 1 / M. A sample for
            which the smallest have none is taught by the others.
        temperature: Softness of both distributions; the paper tunes it from 1 to 20.
        reduction: "elementwise" averages over classes as well, as the repository does: C times
            less.
    """
    check_teachers("takd", student_logits, teacher_logits, weights)
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    weights = prior(weights, teacher_logits)
    known = [size for size in sizes or [] if size is not None]
    if sizes is not None and len(known) == len(teacher_logits):
        smallest = weights.new_zeros(len(known), 1)
        for number, size in enumerate(known):
            if size == min(known):
                smallest[number] = 1  # and no tensor of numbers: that is a copy from the host
        weights = reweighted(weights, smallest)
    if reduction == "elementwise":
        weights = weights / student_logits.shape[1]
    return kl_to_teachers(student_logits, teacher_logits, weights, temperature=temperature)


@LOSSES.register("takd")
class TAKDLoss(EnsembleLoss, formula=takd_loss):
    """Matches the smallest of the teachers only, the last assistant of a chain.

    The paper's objective is `lambda` of this and `1 - lambda` of `ce`.

    References:
        Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020,
            https://arxiv.org/abs/1902.03393
    """

    needs = (Logits(),)

    def forward(self, student: Tensors, ensemble: Ensemble, targets: Tensor | None) -> Tensor:
        """Losses (B,)."""
        return takd_loss(
            student[Logits()],
            ensemble.logits,
            [teacher.parameters for teacher in ensemble.teachers],
            weights=ensemble.weights,
            **vars(self.options),
        )
