"""What losses that see all teachers at once share: weights, and the distances they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.analytic_grad import with_gradient
from fedkd.functional.options import Positive
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.losses.kd import comparable, floored, softened_kl, unfloored

Scale = Literal["normalised", "published"]

# Numbers looked at in one go: more would leave the cache of a CPU, and fill a GPU for nothing.
_BLOCK = {"cpu": 2**18}
_LARGE_BLOCK = 2**24


@loss_function("weighted_kl")
def weighted_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: Positive = 4.0,
) -> Tensor:
    """T^2 * sum of weight * KL(teacher || student) per sample.

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        weights: Any numbers, (M, B); None means 1 / M.
        temperature: Softness of all distributions.

    Returns:
        (B,).
    """
    check_teachers("weighted_kl", student_logits, teacher_logits, weights)
    return kl_to_teachers(student_logits, teacher_logits, weights, temperature=temperature)


def kl_to_teachers(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | None, *, temperature: float
) -> Tensor:
    """`weighted_kl` of what a loss has looked at itself."""
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    weights = prior(weights, teacher_logits)

    def solve(logits: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        return _solve(logits, teacher_logits, weights, temperature, differentiate)

    def formula(logits: Tensor) -> Tensor:
        return (weights * softened_kl(logits, teacher_logits, temperature)).sum(dim=0)

    return with_gradient(student_logits, solve, formula)


def check_teachers(
    loss: str, student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None
) -> None:
    """Raise `ValueError` unless logits (B, C), those of M teachers and weights (M, B) agree."""
    check_batch(
        loss,
        student_logits,
        teacher_logits,
        weights=weights,
        classes=student_logits.shape[-1],
        together=True,
    )


def squared_distances(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Mean square of student's less teacher's map per teacher and sample, M x (B, ...) -> (M, B).

    Args:
        student_maps: The student's map as projected for each teacher.
        teacher_maps: The teachers' maps, of the same shapes.
    """
    distances = []
    for ours, theirs in zip(student_maps, teacher_maps, strict=True):
        ours, theirs = comparable(ours, theirs)
        # Dividing the B sums spares backward a pass over the maps.
        squares = F.mse_loss(ours, theirs, reduction="none").flatten(1).sum(dim=1)
        distances.append(squares / ours[0].numel())
    return torch.stack(distances)


def prior(weights: Tensor | None, teacher_logits: Tensor) -> Tensor:
    """What fusion says of each teacher on each sample, (M, B); the same of all if it is None."""
    if weights is None:
        count = len(teacher_logits)
        return teacher_logits.new_full(teacher_logits.shape[:2], 1 / count)
    return weights.detach().to(teacher_logits.dtype)


def reweighted(weights: Tensor, scores: Tensor) -> Tensor:
    """Weights times scores, both (M, B), of which those of a sample sum to one.

    A sample on which nothing is left keeps the weights it had.
    """
    product = weights * scores
    total = product.sum(dim=0)
    return torch.where(total <= 0, weights, product / total.clamp(min=1e-30))


@torch.no_grad()
def _solve(
    student: Tensor, teachers: Tensor, weights: Tensor, temperature: float, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Value (B,) and gradient (B, C), which needs no more of the teachers than their mixture."""
    log_p = F.log_softmax(student / temperature, dim=-1)
    value = weights.new_zeros(len(student))
    mixture = torch.zeros_like(log_p)
    size = _BLOCK.get(student.device.type, _LARGE_BLOCK) // max(student.numel(), 1)
    floored(log_p)
    for some, their in zip(teachers.split(max(1, size)), weights.split(max(1, size))):
        log_q = floored(F.log_softmax(some / temperature, dim=-1))
        weighted = log_q.exp().mul_(their[..., None])
        if differentiate:
            mixture.add_(weighted.sum(dim=0))
        value.add_(log_q.sub_(log_p).mul_(weighted).sum(dim=(0, 2)))
    unfloored(value, temperature**2)
    if not differentiate:
        return value, None
    surplus = log_p.exp_().mul_(weights.sum(dim=0)[:, None]).sub_(mixture)
    return value, surplus.mul_(temperature)
