"""Densely guided distillation: a chain of assistants, each taught by all larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedkd.functional.options import CountFromZero, Part, Positive
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble
from fedkd.losses import LOSSES
from fedkd.losses.base import EnsembleLoss, Tensors
from fedkd.losses.divergence import check_teachers, kl_to_teachers, prior
from fedkd.losses.inputs import loss_function
from fedkd.losses.kd import comparable

Reduction = Literal["batchmean", "elementwise"]


_CPU = torch.device("cpu")


@loss_function("dgkd")
def dgkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: Tensor | None = None,
    kept: Sequence[int] | Tensor | None = None,
    temperature: Positive = 5.0,
    reduction: Reduction = "batchmean",
    combine: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """T^2 * mean or sum of KL(teacher || student) over the kept teachers, per sample -> (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        weights: Weight of each teacher on each sample, (M, B); None means 1 / M.
        kept: Numbers of the teachers that count on this batch, or for each whether it does; None
            means all. Where none does the loss is zero.
        temperature: Softness of all distributions.
        reduction: "elementwise" averages over classes as well, as the repository does: C times
            less.
        combine: "mean" over teachers, or their "sum" as published: M times as much.
    """
    check_teachers("dgkd", student_logits, teacher_logits, weights)
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    weights = prior(weights, teacher_logits)
    count = len(teacher_logits)
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        weights = weights * kept[:, None]
    elif kept is not None:
        kept = torch.as_tensor(kept, dtype=torch.long, device=weights.device)
        weights, teacher_logits = weights[kept], teacher_logits[kept]
    if combine == "sum":
        weights = weights * count
    elif kept is not None:
        weights = weights / weights.sum(dim=0).clamp(min=1e-30)
    if reduction == "elementwise":
        weights = weights / student_logits.shape[1]
    return kl_to_teachers(student_logits, teacher_logits, weights, temperature=temperature)


@LOSSES.register("dgkd")
class DGKDLoss(EnsembleLoss, formula=dgkd_loss):
    """Matches the teacher and all its assistants, of whom chance may drop some.

    The paper's objective is `lambda` of this and `1 - lambda` of `ce`.

    Args:
        drop: How many teachers, drawn anew for each batch, do not count (the repository's 1); at
            least one is kept. Only while training.
        survival: Chance of each teacher to count on a batch (the paper's 0.75); sometimes
            none has. Only while training.
        formula: Options of `dgkd_loss`.

    References:
        Son et al., "Densely Guided Knowledge Distillation Using Multiple Teacher Assistants",
            ICCV 2021, https://arxiv.org/abs/2009.08825
    """

    needs = (Logits(),)

    def __init__(
        self, *, drop: CountFromZero = 0, survival: Part | None = None, **formula: Any
    ) -> None:
        super().__init__(**formula)
        if drop and survival is not None:
            raise ValueError("loss 'dgkd': drop and survival exclude each other")
        self.drop = drop
        self.survival = survival

    def forward(self, student: Tensors, ensemble: Ensemble, targets: Tensor | None) -> Tensor:
        """Losses (B,)."""
        return dgkd_loss(
            student[Logits()],
            ensemble.logits,
            weights=ensemble.weights,
            kept=self._draw(len(ensemble), ensemble.weights.device),
            **vars(self.options),
        )

    def _draw(self, count: int, device: torch.device = _CPU) -> Tensor | None:
        """Teachers that count on this batch."""
        if not self.training:
            return None
        if device.type != "cpu":  # drawn where nobody has to wait for it
            if self.survival is not None:
                return torch.rand(count, device=device) < self.survival
            order = torch.rand(count, device=device).argsort().argsort()
            return order < max(1, count - self.drop) if self.drop else None
        if self.survival is not None:
            return (torch.rand(count) < self.survival).nonzero()[:, 0]
        if self.drop:
            return torch.randperm(count)[: max(1, count - self.drop)].sort().values
        return None
