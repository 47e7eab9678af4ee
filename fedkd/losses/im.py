"""Information maximisation: sure of each image, and of all classes over many."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Kind, Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function


@loss_function("im")
def im_loss(student_logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean entropy of the predictions minus the entropy of their mean, (B, C) -> scalar.

    Args:
        student_logits: (B, C).
        weights: Weight of each sample, (B,).
    """
    check_batch("im", student_logits, weights=weights, classes=student_logits.shape[-1])
    log_p = F.log_softmax(full(student_logits), dim=1)
    each = log_p.new_ones(len(log_p)) if weights is None else weights.to(log_p.dtype)
    p = log_p.exp()
    # A class that nobody thinks of has no part: 0 log 0 is 0.
    entropies = -(p * torch.where(p == 0, 0, log_p)).sum(dim=1)
    mean = (each[:, None] * p).sum(dim=0) / each.sum().clamp(min=torch.finfo(p.dtype).tiny)
    of_the_mean = -(mean * torch.where(mean == 0, 1, mean).log()).sum()
    return (each * entropies).mean() - each.mean() * of_the_mean


@LOSSES.register("im")
class IMLoss(FormulaLoss, formula=im_loss):
    """Sure on each image, undecided over the batch; looks at no teacher and no label.

    For a student in an unlabelled domain. The weight of the paper is 0.3 beside pseudo-labels.

    References:
        Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for
            Unsupervised Domain Adaptation", ICML 2020, https://arxiv.org/abs/2002.08546, Eq. 4
    """

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The student's logits, though no teacher's."""
        return (Logits(),)
