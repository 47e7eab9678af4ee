"""What losses that see all teachers at once share: weights, and the distances they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.closed_form import wanted, with_gradient
from fedkd.losses.kd import comparable

Scale = Literal["normalised", "published"]

# Numbers looked at in one go: more would leave the cache of a CPU, and fill a GPU for nothing.
_BLOCK = {"cpu": 2**18}
_LARGE_BLOCK = 2**24


def weighted_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 4.0,
) -> Tensor:
    """T^2 * sum of weight * KL(teacher || student) per sample.

    Half precision is computed in float32; teachers and weights are detached.

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        weights: Any numbers, (M, B); None means 1 / M.
        temperature: Softness of all distributions.

    Returns:
        (B,).
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    weights = prior(weights, teacher_logits)
    value, gradient = _solve(
        student_logits, teacher_logits, weights, temperature, wanted(student_logits)
    )
    return with_gradient(student_logits, value, gradient)


def squared_distances(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Mean square of student's less teacher's map per teacher and sample, M x (B, ...) -> (M, B).

    Half precision is computed in float32; the teachers' maps are detached.

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
    return torch.where(total > 0, product / total.clamp(min=1e-30), weights)


@torch.no_grad()
def _solve(
    student: Tensor, teachers: Tensor, weights: Tensor, temperature: float, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Value (B,) and gradient (B, C), which needs no more of the teachers than their mixture."""
    log_p = F.log_softmax(student / temperature, dim=-1)
    value = weights.new_zeros(len(student))
    mixture = torch.zeros_like(log_p)
    size = _BLOCK.get(student.device.type, _LARGE_BLOCK) // max(student.numel(), 1)
    for some, their in zip(teachers.split(max(1, size)), weights.split(max(1, size))):
        log_q = F.log_softmax(some / temperature, dim=-1)
        weighted = log_q.exp().mul_(their[..., None])
        if differentiate:
            mixture.add_(weighted.sum(dim=0))
        value.add_(log_q.sub_(log_p).mul_(weighted).sum(dim=(0, 2)))
    value.mul_(temperature**2)
    if not differentiate:
        return value, None
    surplus = log_p.exp_().mul_(weights.sum(dim=0)[:, None]).sub_(mixture)
    return value, surplus.mul_(temperature)
