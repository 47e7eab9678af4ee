"""Cross entropy on the targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.knowledge.kinds import Kind, Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, Tensors, Trust


def ce_loss(student_logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy per sample, (B, C) x (B,) -> (B,)."""
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()
    return F.cross_entropy(
        student_logits, targets, reduction="none", label_smoothing=label_smoothing
    )


@LOSSES.register("ce")
class CELoss(DistillationLoss):
    """Cross entropy on the targets; looks at no teacher. Needs labels.

    Args:
        label_smoothing: Probability mass spread evenly over all classes.
    """

    needs_targets = True

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"loss 'ce': label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The student's logits, though no teacher's."""
        return (Logits(),)

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: Trust
    ) -> Tensor:
        """Losses (B,)."""
        assert targets is not None
        return ce_loss(student[Logits()], targets, label_smoothing=self.label_smoothing)
