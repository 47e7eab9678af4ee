"""Hinton's knowledge distillation, and the standardisation of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedkd.closed_form import wanted, with_gradient
from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, Tensors, Trust


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    standardise: bool = False,
) -> Tensor:
    """T^2 * KL(teacher || student) per sample, summed over classes, (B, C) x (B, C) -> (B,).

    Half precision is computed in float32; the teacher is detached.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    if standardise:
        student_logits, teacher_logits = standardised(student_logits), standardised(teacher_logits)
    differentiate = wanted(student_logits)
    value, gradient = _solve(student_logits.detach(), teacher_logits, temperature, differentiate)
    return with_gradient(student_logits, value, gradient)


def comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the student's precision, at least float32; the teacher detached."""
    if student.dtype in (torch.float16, torch.bfloat16):
        student = student.float()
    return student, teacher.detach().to(student.dtype)


def standardised(logits: Tensor) -> Tensor:
    """Z-score of each sample over its classes (unbiased std, as published), (B, C) -> (B, C).

    A row whose logits are all equal becomes zeros without gradient: it has no direction, and the
    published formula would multiply its gradient by 1e7.
    """
    scores: Tensor = _Standardise.apply(logits)
    return scores


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


def _solve(
    student: Tensor, teacher: Tensor, temperature: float, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """T^2 * KL and its gradient, T * (student's less teacher's probabilities).

    Without T^2 the gradient would fade as 1/T^2 against cross entropy.
    """
    logits = torch.stack([student, teacher]).div_(temperature)
    log_s, log_t = F.log_softmax(logits, dim=-1)
    p, q = F.softmax(logits, dim=-1)  # on a CPU faster than exp
    value = log_t.sub_(log_s).mul_(q).sum(dim=-1).mul_(temperature**2)
    return value, p.sub_(q).mul_(temperature) if differentiate else None


class _Standardise(torch.autograd.Function):
    """The z-score, without `Tensor.std`, which on a CPU takes longer than all the rest."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        centred = logits - logits.mean(dim=-1, keepdim=True)
        freedom = max(logits.shape[-1] - 1, 1)
        std = (centred * centred).sum(dim=-1, keepdim=True).div_(freedom).sqrt_()
        torch.threshold_(std, 1e-7, torch.inf)
        scale = (std + 1e-7).reciprocal_()
        scores = centred.mul_(scale)
        ctx.save_for_backward(scores, scale, std)
        ctx.freedom = freedom
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        scores, scale, std = ctx.saved_tensors
        grad = grad - grad.mean(dim=-1, keepdim=True)
        along = (grad * scores).sum(dim=-1, keepdim=True).div_(std * ctx.freedom)
        return grad.mul_(scale).addcmul_(scores, along, value=-1)
