"""Decoupled knowledge distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, Tensors, Trust


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD) per sample, (B, C) x (B, C) x (B,) -> (B,).

    TCKD compares target against rest, NCKD the distributions over the rest; with two classes
    NCKD is exactly zero. Half precision is computed in float32; the teacher is detached.
    """
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    teacher_logits = teacher_logits.detach().to(student_logits.dtype)
    loss: Tensor = _DKD.apply(student_logits, teacher_logits, targets, alpha, beta, temperature)
    return loss


@LOSSES.register("dkd")
class DKDLoss(DistillationLoss):
    """Matches the target class and the other classes separately. Needs labels.

    Args:
        alpha: Weight of the target-class part.
        beta: Weight of the non-target part; the paper's runs use 0.5 to 8, more where the
            teacher is surer.
        temperature: Softness of both distributions.

    References:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022,
            https://arxiv.org/abs/2203.08679
    """

    needs = (Logits(),)
    needs_targets = True

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"loss 'dkd': temperature must be positive, got {temperature}")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: Trust
    ) -> Tensor:
        """Losses (B,)."""
        assert targets is not None
        return dkd_loss(
            student[Logits()],
            teacher[Logits()],
            targets,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )


class _DKD(torch.autograd.Function):
    """The loss with its gradient in closed form: one (B, C) tensor is kept for backward.

    The official code hides the target behind -1000 and takes the log of summed probabilities,
    which is inf or NaN for sure predictions. Log-odds from a log-sum-exp over the other classes
    say the same and hold for any finite logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor,
        alpha: float,
        beta: float,
        temperature: float,
    ) -> Tensor:
        target = targets[:, None]
        odds_s, log_r, r = _split(student / temperature, target)
        odds_t, log_q, q = _split(teacher / temperature, target)
        surplus = torch.sigmoid(odds_s) - torch.sigmoid(odds_t)
        tckd = torch.sigmoid(odds_t) * (F.logsigmoid(odds_t) - F.logsigmoid(odds_s))
        tckd += torch.sigmoid(-odds_t) * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
        nckd = log_q.sub_(log_r).mul_(q).sum(dim=1, keepdim=True)
        if ctx.needs_input_grad[0]:
            gradient = r.mul_(beta - alpha * surplus).sub_(q, alpha=beta)
            gradient.scatter_(1, target, alpha * surplus)
            ctx.save_for_backward(gradient.mul_(temperature))
        return (temperature**2 * (alpha * tckd + beta * nckd)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None, None, None, None


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target log-odds (B, 1); log-probability (0 at the target) and probability of the rest.

    Consumes `logits` (B, C).
    """
    at_target = logits.gather(1, target)
    logits.scatter_(1, target, -torch.inf)
    top = logits.amax(dim=1, keepdim=True)
    rest = (logits - top).exp_()
    mass = rest.sum(dim=1, keepdim=True)
    level = top + mass.log()
    # The target's log-probability among the rest is -inf; 0 keeps 0 * (-inf) out of the sums.
    return at_target - level, logits.sub_(level).scatter_(1, target, 0), rest.div_(mass)
