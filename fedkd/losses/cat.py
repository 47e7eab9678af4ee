"""Class attention transfer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.feature_statistics import averaged
from fedkd.functional.options import Count
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import ClassMaps, Kind
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function

KeepRule = Literal["top", "above_nth", "below_nth_of_100"]


@loss_function("cat")
def cat_loss(
    student_maps: Tensor,
    teacher_maps: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    size: Count = 2,
    normalise: bool = True,
    binarise: bool = False,
    keep: Count | None = None,
    keep_rule: KeepRule = "top",
) -> Tensor:
    """Mean squared distance of coarse class maps per sample, (B, C, h, w) x (B, C, H, W) -> (B,).

    A map of zeros stays zeros under `normalise` and gets no gradient, where the published formula
    multiplies it by 1e12.

    Args:
        student_maps: Class maps of any size; their mean over places is the student's logits.
        teacher_maps: The teacher's, of any size.
        teacher_logits: By which `keep` ranks classes, (B, C); None takes the mean of the
            teacher's maps over places, which are its logits less the bias, as published.
        size: Side of the grid the maps are averaged to.
        normalise: Give each class map unit length first, so that only its pattern counts. At
            `size` 1 only its sign is left.
        binarise: Turn the teacher's maps into ones where they exceed their mean absolute value.
            They must not be averaged yet, so they are needed at full size.
        keep: Compare only so many classes of each sample; None compares all.
        keep_rule: Which: "top" keeps the teacher's most likely ones. The published strategies are
            "above_nth", those strictly above the n-th (so n - 1), and "below_nth_of_100", those
            not above the (100 - n)-th (of 100 classes the n + 1 least likely).
    """
    check_batch("cat", student_maps, teacher_maps, teacher_logits)
    student_maps = full(student_maps)
    teacher_maps = teacher_maps.detach().to(student_maps.dtype)
    if keep is not None and teacher_logits is None:
        teacher_logits = teacher_maps.mean(dim=(2, 3))
    if binarise:
        level = teacher_maps.abs().mean(dim=(2, 3), keepdim=True)
        teacher_maps = (teacher_maps > level).to(teacher_maps.dtype)
    student = averaged(student_maps, (size, size)).flatten(2)
    teacher = averaged(teacher_maps, (size, size)).flatten(2)
    if normalise:
        student, teacher = _unit(student), _unit(teacher)
    squares = F.mse_loss(student, teacher, reduction="none")
    if keep is None:
        return squares.sum(dim=(1, 2)) / (student.shape[1] * size**2)
    squares = squares.mean(dim=2)
    assert teacher_logits is not None
    kept = _kept(teacher_logits.detach(), keep, keep_rule)
    # The published mean runs over all kept maps of the batch. If their number is no multiple of B,
    # the published code keeps all classes and says nothing; this happens with ties only.
    kept = kept | (kept.sum() % len(kept) != 0)
    return (squares * kept).sum(dim=1) * len(kept) / kept.sum().clamp(min=1)


@LOSSES.register("cat")
class CATLoss(FormulaLoss, formula=cat_loss):
    """Matches where each class is seen, on a coarse grid.

    With `ce` it is CAT-KD, alone it is CAT.

    References:
        Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023,
            https://arxiv.org/abs/2304.12777
    """

    needs: tuple[Kind, ...] = (ClassMaps(2),)

    def __init__(self, **formula: Any) -> None:
        super().__init__(**formula)
        self.needs = (ClassMaps(None if self.options.binarise else self.options.size),)

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The coarse maps; only the teacher's are ever binarised."""
        return (ClassMaps(self.options.size),)


def _unit(maps: Tensor) -> Tensor:
    """Unit length over the last axis."""
    length = torch.linalg.vector_norm(maps, dim=-1, keepdim=True)
    return maps * ((length > 1e-12) / length.clamp(min=1e-12))


def _kept(logits: Tensor, keep: int, rule: KeepRule) -> Tensor:
    """Which classes of each sample are compared, (B, C) -> bool (B, C)."""
    classes = logits.shape[1]
    if rule == "top":
        best = logits.topk(min(keep, classes), dim=1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)
    rank = keep - 1 if rule == "above_nth" else 99 - keep
    if not -classes <= rank < classes:
        raise ValueError(f"loss 'cat': keep {keep} by {rule!r} does not fit {classes} classes")
    above = logits > logits.sort(dim=1, descending=True).values[:, rank, None]
    return above if rule == "above_nth" else ~above
