"""FixMatch: what the student is sure of on an image, it learns on a distorted one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.options import Share
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function


@loss_function("fixmatch")
def fixmatch_loss(
    student_logits: Tensor, virtual_logits: Tensor, *, confidence: Share = 0.95
) -> Tensor:
    """Cross entropy of a distorted view on the other's class, (B, C) x (B, C) -> (B,).

    Args:
        student_logits: Of the image, (B, C); detached.
        virtual_logits: The student's own of a distorted view of it, (B, C).
        confidence: Least probability of a class to be learnt; samples below count as 0.
    """
    classes = student_logits.shape[-1]
    check_batch("fixmatch", student_logits, virtual_logits, classes=classes)
    surest, label = torch.softmax(full(student_logits), dim=1).max(dim=1)
    value = F.cross_entropy(full(virtual_logits), label, reduction="none")
    # What is no number is not passed over. Else nothing of the first view gets through.
    value = torch.where((surest >= confidence) | value.isnan(), value, 0)
    return torch.where(surest.isnan(), surest, value)


@LOSSES.register("fixmatch")
class FixMatchLoss(FormulaLoss, formula=fixmatch_loss):
    """Teaches the virtual view the class that the student is sure of; looks at no teacher.

    References:
        Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and
            Confidence", NeurIPS 2020, https://arxiv.org/abs/2001.07685
    """

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The student's logits of both views, though no teacher's."""
        return (Logits(), VirtualLogits(0))
