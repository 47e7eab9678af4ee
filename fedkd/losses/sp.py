"""Similarity-preserving distillation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.analytic_grad import with_gradient
from fedkd.knowledge.kinds import Kind, Pooled, Stage
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.losses.kd import comparable

Space = Literal["map", "features"]


@loss_function("sp")
def sp_loss(student: Tensor, teacher: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean squared difference of the samples' normalised similarities, a scalar.

    A row of the student's (B, B) products of samples, divided by its length, is held against the
    teacher's row.

    Args:
        student: Features, (B, ...), flattened here; half precision is computed in float32.
        teacher: (B, ...), detached; sizes beyond B may differ.
        weights: This teacher's weight on each sample, (B,); ones if None. The similarity of two
            samples counts the root of their product, in the row's length as well, so a sample
            without weight drops out.
    """
    check_batch("sp", student, teacher, weights=weights)
    student, teacher = comparable(student.flatten(1), teacher.flatten(1))
    share: Tensor | float = 1.0
    metric: Tensor | float = 1.0
    if weights is not None:
        root = weights.detach().to(student.dtype).sqrt()
        share, metric = root[:, None] * root, _metric(root)

    def solve(x: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        similar, length = _rows(x, metric)
        gap = similar - _rows(teacher, metric)[0]
        pull = share * gap
        value = (pull * gap).sum() / len(x) ** 2
        if not differentiate:
            return value, None
        # By a row before it was divided: the part along the row does nothing.
        pull -= (pull * similar).sum(dim=1, keepdim=True) * (metric * similar)
        pull /= length
        return value, (pull + pull.T).mul_(2 / len(x) ** 2) @ x

    def formula(x: Tensor) -> Tensor:
        gap = _unit_rows(x, metric) - _unit_rows(teacher, metric)
        return (share * gap.square()).mean()

    return with_gradient(student, solve, formula)


@LOSSES.register("sp")
class SPLoss(FormulaLoss, formula=sp_loss):
    """Matches which samples of a batch the network finds similar.

    Args:
        space: What similarity is judged by: "map" is the deepest stage's feature map, as
            published; "features" the pooled vector, which is much smaller to send.

    References:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019,
            https://arxiv.org/abs/1907.09682
    """

    needs: tuple[Kind, ...] = (Stage(-1),)

    def __init__(self, *, space: Space = "map") -> None:
        super().__init__()
        self.needs = (Stage(-1),) if space == "map" else (Pooled(),)


def _metric(root: Tensor) -> Tensor:
    """Weights of the entries of a row in its length, mean 1."""
    mean = root.mean()
    return torch.where(mean > 0, root / mean, 1)


def _unit_rows(features: Tensor, metric: Tensor | float) -> Tensor:
    """Products of samples, each row divided by its length, (B, B), for autograd."""
    gram = features @ features.T
    square = (metric * gram * gram).sum(dim=1, keepdim=True)
    none = square <= 1e-24
    return torch.where(none, 0, gram / torch.where(none, 1, square).sqrt())


def _rows(features: Tensor, metric: Tensor | float) -> tuple[Tensor, Tensor]:
    """Products of samples, each row divided by its length, and the lengths, inf for zero."""
    gram = features @ features.T
    length = (metric * gram * gram).sum(dim=1, keepdim=True).sqrt_()
    # Published is a clamp at 1e-12, below which a row is not of unit length.
    length = F.threshold(length, 1e-12, torch.inf)
    return gram / length, length
