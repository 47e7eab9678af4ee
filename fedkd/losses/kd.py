"""Hinton's knowledge distillation, and the standardisation of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, Tensors, Trust


def standardised(logits: Tensor) -> Tensor:
    """Z-score of each sample over its classes (unbiased std, as published), (B, C) -> (B, C).

    A row whose logits are all equal becomes zeros without gradient: it has no direction, and the
    published formula would multiply its gradient by 1e7.
    """
    centred = logits - logits.mean(dim=-1, keepdim=True)
    std = logits.std(dim=-1, keepdim=True)
    return torch.where(std > 1e-7, centred / (std + 1e-7), 0)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    standardise: bool = False,
) -> Tensor:
    """T^2 * KL(teacher || student) per sample, summed over classes, (B, C) x (B, C) -> (B,).

    Half precision is computed in float32; the teacher is detached.
    """
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    teacher_logits = teacher_logits.detach().to(student_logits.dtype)
    if standardise:
        student_logits, teacher_logits = standardised(student_logits), standardised(teacher_logits)
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    # Without T^2 the gradient would fade as 1/T^2 against cross entropy.
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


@LOSSES.register("kd")
class KDLoss(DistillationLoss):
    """Matches the teacher's softened probabilities.

    Args:
        temperature: Softness of both distributions; 2 is usual with `standardise`.
        standardise: Compare z-scores of the logits, so that the student need not copy their
            shift and range (Sun et al.).

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015,
            https://arxiv.org/abs/1503.02531
        Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
            https://arxiv.org/abs/2403.01427
    """

    needs = (Logits(),)

    def __init__(self, *, temperature: float = 4.0, standardise: bool = False) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"loss 'kd': temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.standardise = standardise

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: Trust
    ) -> Tensor:
        """Losses (B,)."""
        return kd_loss(
            student[Logits()],
            teacher[Logits()],
            temperature=self.temperature,
            standardise=self.standardise,
        )
