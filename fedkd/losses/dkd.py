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
from fedkd.losses.kd import comparable, standardised


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardise: bool = False,
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD) per sample, (B, C) x (B, C) x (B,) -> (B,).

    TCKD compares target against rest, NCKD the distributions over the rest; with two classes
    NCKD is exactly zero. Half precision is computed in float32; the teacher is detached.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    if standardise:
        student_logits, teacher_logits = standardised(student_logits), standardised(teacher_logits)
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
        standardise: Compare z-scores of the logits (Sun et al.).

    References:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022,
            https://arxiv.org/abs/2203.08679
        Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
            https://arxiv.org/abs/2403.01427
    """

    needs = (Logits(),)
    needs_targets = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"loss 'dkd': temperature must be positive, got {temperature}")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.standardise = standardise

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
            standardise=self.standardise,
        )


class _DKD(torch.autograd.Function):
    """The loss with its gradient in closed form: one (B, C) tensor is kept for backward.

    The official code hides the target behind -1000 and takes the log of summed probabilities,
    which is inf or NaN for sure predictions. Log-odds from a log-sum-exp over the other classes
    say the same and hold for any finite logits. Student and teacher lie in one tensor, because
    a small batch costs as many calls as numbers.
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
        logits = torch.stack([student, teacher]).div_(temperature)
        target = targets[:, None]
        both = target.expand(2, -1, 1)
        at_target = logits.gather(2, both)
        logits.scatter_(2, both, -torch.inf)
        # Over the other classes; at the top of the distribution nothing cancels.
        log_rest = F.log_softmax(logits, dim=2)
        level = logits.amax(dim=2, keepdim=True) - log_rest.amax(dim=2, keepdim=True)
        rest = torch.exp(log_rest, out=logits)
        log_rest.scatter_(2, both, 0)  # and not -inf, for 0 * (-inf) would spoil the sums
        (r, q), (log_r, log_q) = rest.unbind(), log_rest.unbind()
        odds = at_target - level
        odds = torch.cat([odds, -odds], dim=2)  # log-odds of (target, rest)
        log_share, share = F.logsigmoid(odds), odds.sigmoid()
        tckd = (share[1] * (log_share[1] - log_share[0])).sum(dim=1)
        nckd = log_q.sub_(log_r).mul_(q).sum(dim=1)
        if ctx.needs_input_grad[0]:
            surplus = (share[0, :, :1] - share[1, :, :1]).mul_(alpha)
            gradient = r.mul_((beta - surplus).mul_(temperature)).sub_(q, alpha=beta * temperature)
            ctx.save_for_backward(gradient.scatter_(1, target, surplus.mul_(temperature)))
        return tckd.mul_(alpha).add_(nckd, alpha=beta).mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None, None, None, None
