"""Cross entropy on the targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.options import Share
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Kind, Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, class_numbers, loss_function

# A target that is no class is refused or, on a GPU, stops the device, as in all other losses.
_NOTHING = torch.iinfo(torch.int64).min


@loss_function("ce")
def ce_loss(student_logits: Tensor, targets: Tensor, *, label_smoothing: Share = 0.0) -> Tensor:
    """Cross entropy per sample, (B, C) x (B,) -> (B,).

    Args:
        student_logits: (B, C).
        targets: Class indices, (B,).
        label_smoothing: Probability mass spread evenly over all classes.
    """
    check_batch("ce", student_logits, classes=student_logits.shape[-1])
    return F.cross_entropy(
        full(student_logits),
        class_numbers("ce", targets, student_logits),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=_NOTHING,
    )


@LOSSES.register("ce")
class CELoss(FormulaLoss, formula=ce_loss):
    """Cross entropy on the targets; looks at no teacher. Needs labels."""

    needs_targets = True

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The student's logits, though no teacher's."""
        return (Logits(),)
