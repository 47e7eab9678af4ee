"""Teachers of different classes, each matched among its own."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.options import Positive
from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.losses.kd import comparable, softened_kl


@loss_function("subset_kd")
def subset_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Positive = 4.0,
    mine: Literal["fusion", "entropy"] = "fusion",
) -> Tensor:
    """T^2 * KL(teacher || student among the teacher's classes) per sample, (B, C) -> (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C), -inf for classes that the teacher does not know.
        temperature: Softness of both distributions.
        mine: Whether an image is the teacher's own: `fusion` by the weight that fusion rules gave
            it, `entropy` also by how sure it is, 1 - H / log of the number of its classes.
    """
    classes = student_logits.shape[-1]
    check_batch("subset_kd", student_logits, teacher_logits, classes=classes)
    student, teacher = comparable(student_logits, teacher_logits)
    unknown = teacher.isneginf()
    value = softened_kl(student.masked_fill(unknown, -math.inf), teacher, temperature)
    if mine == "entropy":
        log_q = F.log_softmax(teacher, dim=-1)
        entropy = -torch.where(unknown, 0, log_q.exp() * log_q).sum(dim=-1)
        value = value * (1 - entropy / (~unknown).sum(dim=-1).to(value).log())
    return value


@LOSSES.register("subset_kd")
class SubsetKDLoss(FormulaLoss, formula=subset_kd_loss):
    """Matches each teacher's softened probabilities among the classes that it knows.

    The dual form of fusion `specialists`: teacher by teacher, and no teacher says anything of a
    class that it does not know. So nothing compares the classes of two teachers that share none:
    `ce` on the fused winners, or labels, must tell them apart.

    References:
        Shen et al., "Amalgamating Knowledge towards Comprehensive Classification", AAAI 2019,
            https://arxiv.org/abs/1811.02796
    """

    needs = (Logits(),)
    partial = True
