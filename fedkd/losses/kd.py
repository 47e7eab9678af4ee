"""Hinton's knowledge distillation, and the standardisation of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.analytic_grad import (
    needs_grad,
    through,
    transformed,
    with_gradient,
    with_gradient_each,
)
from fedkd.functional.options import Positive
from fedkd.functional.precision import abreast, full, full_precision
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss, Tensors
from fedkd.losses.inputs import check_batch, loss_function


@loss_function("kd")
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Positive = 4.0,
    standardise: bool = False,
) -> Tensor:
    """T^2 * KL(teacher || student) per sample, summed over classes, (B, C) x (B, C) -> (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: Softness of both distributions; 2 is usual with `standardise`.
        standardise: Compare z-scores of the logits, so that the student need not copy their
            shift and range (Sun et al.).
    """
    classes = student_logits.shape[-1]
    check_batch("kd", student_logits, teacher_logits, classes=classes, places=True)
    return kl_to_teacher(student_logits, teacher_logits, temperature, standardise)


def kl_to_teacher(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, standardise: bool = False
) -> Tensor:
    """`kd_loss` of what a loss has looked at itself."""
    student, teacher = comparable(student_logits, teacher_logits)

    def solve(logits: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        both, grad_to_logits = paired(logits, teacher, standardise, temperature)
        value, gradient = _solve(both, temperature)
        return value, grad_to_logits(gradient) if differentiate else None

    def formula(logits: Tensor) -> Tensor:
        z, t = (standardised(z) if standardise else z for z in (logits, teacher))
        return softened_kl(z, t, temperature)

    return with_gradient(student, solve, formula)


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL of the teacher's softened probabilities to the student's, (..., C) -> (...)."""
    log_p, log_q = (F.log_softmax(z / temperature, dim=-1) for z in (student, teacher))
    return temperature**2 * divergence(log_p, log_q)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) of log-probabilities, (..., C) -> (...): 0 log 0 is 0, also where p is 0."""
    q = log_q.exp()
    return (q * torch.where(q == 0, 0, log_q - log_p)).sum(dim=-1)


def comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the student's precision, at least float32; the teacher detached."""
    student = full(student)
    return student, teacher.detach().to(student.dtype)


def paired(
    student: Tensor, teacher: Tensor, standardise: bool, temperature: float | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Logits of both in one tensor, (2, B, C), and `grad_to_logits`.

    That function turns a gradient by the student's (standardised) logits into one by its logits.
    A small batch costs as many calls as numbers, so both go through each call together.

    Args:
        student: (B, C).
        teacher: (B, C).
        standardise: Whether to take z-scores.
        temperature: Divides them, and then the result may be overwritten.
    """
    logits = torch.stack([student.detach(), teacher])
    if not standardise:
        return logits if temperature is None else logits.div_(temperature), lambda slope: slope
    scores, scale, std = _z_scores(logits)
    softened = scores if temperature is None else scores / temperature
    return softened, lambda slope: _by_logits(slope, scores[0], scale[0], std[0])


def standardised(logits: Tensor) -> Tensor:
    """Z-score of each sample over its classes (unbiased std, as published), (B, C) -> (B, C).

    A row whose logits are all equal becomes zeros without gradient: it has no direction, and the
    published formula would multiply its gradient by 1e7.
    """
    if transformed(logits):
        return _plain_scores(logits)
    scores: Tensor = _Standardise.apply(logits)
    return scores


@LOSSES.register("kd")
class KDLoss(FormulaLoss, formula=kd_loss):
    """Matches the teacher's softened probabilities.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015,
            https://arxiv.org/abs/1503.02531
        Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
            https://arxiv.org/abs/2403.01427
    """

    needs = (Logits(),)

    def together(
        self, student: Tensors, ensemble: Ensemble, targets: Tensor | None
    ) -> list[Tensor] | None:
        """Losses (B,) of each teacher."""
        temperature = self.options.temperature
        return rows_together(
            student[Logits()],
            ensemble,
            lambda both: _solve(both.unflatten(0, (2, -1)), temperature),
            self.options.standardise,
            temperature,
        )


@full_precision
def rows_together(
    logits: Tensor,
    ensemble: Ensemble,
    solve: Callable[[Tensor], tuple[Tensor, Tensor]],
    standardise: bool,
    temperature: float,
) -> list[Tensor] | None:
    """A loss of each sample's logits, of all teachers in one go, (B, C) -> M times (B,).

    Args:
        logits: The student's.
        ensemble: The teachers.
        solve: Value (M B,) and gradient (M B, C) for softened logits (2 M B, C), the teachers'
            below the student's.
        standardise: Whether to take z-scores.
        temperature: Divides the logits.

    Returns:
        None where the losses must be computed one by one: to differentiate them in another way,
        or to name the teacher that is not finite.
    """
    theirs, count = ensemble.logits, len(ensemble)
    if not abreast(logits):
        return None
    if transformed(logits, theirs) or theirs.shape[1:] != logits.shape or logits.shape[1] < 2:
        return None
    logits, theirs = comparable(logits, theirs)
    ours = logits.detach().repeat(count, 1)
    both, grad_to_logits = paired(ours, theirs.flatten(0, 1), standardise, temperature)
    value, slope = solve(both.flatten(0, 1))
    if value.device.type == "cpu" and not math.isfinite(value.sum()):
        return None
    if not needs_grad(logits):
        return list(value.unflatten(0, (count, -1)).unbind())
    gradient = grad_to_logits(slope).unflatten(0, (count, -1))
    return with_gradient_each([logits] * count, value.unflatten(0, (count, -1)), gradient)


def _solve(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 * KL of softened logits (2, B, C), and its gradient T * (student's less teacher's p).

    Without T^2 the gradient would fade as 1/T^2 against cross entropy. Overwriting what is not
    needed any more is all that is different from

        (log_p, log_q), (p, q) = log_softmax(logits), softmax(logits)   # of student and teacher
        return T**2 * (q * (log_q - log_p)).sum(dim=-1), T * (p - q)
    """
    log_s, log_t = floored(F.log_softmax(logits, dim=-1))
    p, q = F.softmax(logits, dim=-1)  # on a CPU faster than exp
    value = unfloored(log_t.sub_(log_s).mul_(q).sum(dim=-1), temperature**2)
    return value, p.sub_(q).mul_(temperature)


def floored(log_p: Tensor) -> Tensor:
    """Log-probabilities of which none is -inf, in place: times a probability of 0 they are 0."""
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def unfloored(value: Tensor, factor: float) -> Tensor:
    """Factor times value, in place; infinite if it holds a floor, by an overflow on the way."""
    return value.mul_(factor * 2.0**64).mul_(2.0**-64)


def _plain_scores(logits: Tensor) -> Tensor:
    """`standardised` for autograd."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    square = centred.square().sum(dim=-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    flat = square <= 1e-14
    return torch.where(flat, 0, centred / (torch.where(flat, 1, square).sqrt() + 1e-7))


def _z_scores(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z-scores, what they are scaled by, and deviations; 0, 0 and inf for a constant row.

    Without `Tensor.std`, which on a CPU takes longer than all the rest.
    """
    centred = logits - logits.mean(dim=-1, keepdim=True)
    std = (centred * centred).sum(dim=-1, keepdim=True)
    std.div_(max(logits.shape[-1] - 1, 1)).sqrt_()
    torch.threshold_(std, 1e-7, torch.inf)
    scale = (std + 1e-7).reciprocal_()
    return centred.mul_(scale), scale, std


def _by_logits(gradient: Tensor, scores: Tensor, scale: Tensor, std: Tensor) -> Tensor:
    """From a gradient by z-scores to one by logits."""
    freedom = max(scores.shape[-1] - 1, 1)
    along = (gradient * scores).sum(dim=-1, keepdim=True).div_(std * freedom)
    gradient = gradient - gradient.mean(dim=-1, keepdim=True)
    return gradient.mul_(scale).addcmul_(scores, along, value=-1)


class _Standardise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        found = _z_scores(logits)
        ctx.save_for_backward(logits, *found)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        logits, *found = ctx.saved_tensors
        if torch.is_grad_enabled():
            return through(_plain_scores, (logits,), grad)[0]
        return _by_logits(grad, *found)
