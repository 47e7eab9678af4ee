"""The plain mean over several teachers."""

from __future__ import annotations

from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaEnsembleLoss
from fedkd.losses.divergence import check_teachers, kl_to_teachers
from fedkd.losses.inputs import loss_function


@loss_function("aver")
def aver_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: Positive = 4.0,
) -> Tensor:
    """T^2 * mean of KL(teacher || student) per sample, (B, C) x (M, B, C) -> (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        weights: Weight of each teacher on each sample, (M, B); None means 1 / M.
        temperature: Softness of all distributions.
    """
    check_teachers("aver", student_logits, teacher_logits, weights)
    return kl_to_teachers(student_logits, teacher_logits, weights, temperature=temperature)


@LOSSES.register("aver")
class AverLoss(FormulaEnsembleLoss, formula=aver_loss):
    """Matches all teachers' softened probabilities alike.

    The same as `kd`, in one go: a hundred teachers cost little more than one.

    References:
        You et al., "Learning from Multiple Teacher Networks", KDD 2017,
            https://doi.org/10.1145/3097983.3098135
    """
