"""Wasserstein distillation of features."""

from __future__ import annotations

import copy
from typing import Any, Literal, Self

from torch import Tensor, nn

from fedkd.functional.feature_statistics import cell_statistics
from fedkd.functional.optimal_transport import bures_distance
from fedkd.functional.options import Count
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import FeatureMoments, FeatureStatistics, Kind, Stage
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.models.projectors import bottleneck, regressor


@loss_function("wkd_f")
def wkd_f_loss(student: Tensor, teacher_statistics: Tensor, *, mean_weight: float = 4.0) -> Tensor:
    """mean_weight * |difference of means|^2 + distance of spreads, per sample, -> (B,).

    Squares are summed over channels and averaged over cells.

    Args:
        student: Its projected map (B, D, h, w), or its cell statistics (B, 2, D, grid, grid).
        teacher_statistics: `cell_statistics` of the teacher's map, (B, 2, D, grid, grid), which
            compares deviations; or its `spatial_moments`, (B, D + 1, D), which compares
            covariances and takes only a map of the student. The sizes of the maps may differ.
        mean_weight: Weight of the means against the spreads (gamma); 2 to 8 in the paper. The
            paper weights the whole term by 0.005 to 1.

    Raises:
        ValueError: the channels or the grids differ.
    """
    check_batch("wkd_f", student, teacher_statistics)
    student = full(student)
    theirs = teacher_statistics.detach().to(student.dtype)
    if theirs.ndim == 3:
        if student.ndim != 4 or student.shape[1] != theirs.shape[2]:
            raise ValueError(_mismatch(student, theirs))
        points = student.flatten(2)
        means = points.mean(dim=2)
        points = (points - means[:, :, None]) / points.shape[2] ** 0.5
        spread = bures_distance(points, theirs[:, 1:]).to(means.dtype)
        return mean_weight * (means - theirs[:, 0]).square().sum(dim=1) + spread
    ours = cell_statistics(student, theirs.shape[-1]) if student.ndim == 4 else student
    if ours.shape != theirs.shape:
        raise ValueError(_mismatch(ours, theirs))
    squares = (ours - theirs).square().flatten(3).mean(dim=3).sum(dim=2)
    return mean_weight * squares[:, 0] + squares[:, 1]


@LOSSES.register("wkd_f")
class WKDFeatureLoss(DistillationLoss, formula=wkd_f_loss):
    """Matches mean and spread of each channel, as a distance between Gaussians.

    Teachers send statistics and not maps, so the size of their maps is unknown here: the projector
    changes the width of the student's map and keeps its size.

    Args:
        stage: Which map of the student; -1 is the deepest.
        teacher_stage: Which of the teacher; None takes the same.
        grid: Cells per side in which means and deviations are taken; 1 takes the whole map. A
            cell of a single pixel has no spread.
        covariance: "diagonal" as published, or the "full" covariance of the channels over the
            whole map, in closed form (much larger to send).
        projector: `conv1x1`; `bottleneck`: 1x1, 3x3 and 1x1 over 256 channels; `none`: as wide
            as the teacher already.
        relu: Whether the projector ends in a ReLU, as published. "auto" leaves it out if a mean
            of the teacher's is negative, which it could never meet.
        formula: Options of `wkd_f_loss`.

    References:
        Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
            Distillation", NeurIPS 2024, https://arxiv.org/abs/2412.08139
    """

    needs: tuple[Kind, ...] = (FeatureStatistics(),)

    def __init__(
        self,
        *,
        stage: int = -1,
        teacher_stage: int | None = None,
        grid: Count = 1,
        covariance: Literal["diagonal", "full"] = "diagonal",
        projector: Literal["conv1x1", "bottleneck", "none"] = "conv1x1",
        relu: bool | Literal["auto"] = "auto",
        **formula: Any,
    ) -> None:
        super().__init__(**formula)
        if covariance == "full" and grid > 1:
            raise ValueError(
                f"loss 'wkd_f': covariance 'full' is that of the whole map, but grid is {grid}"
            )
        seen = stage if teacher_stage is None else teacher_stage
        full = covariance == "full"
        self.needs = (FeatureMoments(seen) if full else FeatureStatistics(seen, grid),)
        self.stage = stage
        self.projector = projector
        self.relu: bool | Literal["auto"] = relu
        self.projection: nn.Module | None = None

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The map to project."""
        return (Stage(self.stage),)

    def adapted(self, student: Tensors, teacher: Tensors) -> Self:
        """With a projector from the student's width to the teacher's."""
        ours, theirs = student[self.reads[0]].shape[1:], teacher[self.needs[0]]
        means, width = theirs[:, 0], theirs.shape[2]
        ready = copy.deepcopy(self)
        if self.projector == "none":
            if ours[0] != width:
                raise ValueError(
                    f"loss 'wkd_f': without a projector the student needs {width} channels, "
                    f"it has {ours[0]}"
                )
            ready.projection = nn.Identity()
            return ready
        relu = bool((means >= 0).all()) if self.relu == "auto" else self.relu
        build = regressor if self.projector == "conv1x1" else bottleneck
        ready.projection = build(ours, (width, *ours[1:]), relu=relu)
        return ready

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        assert self.projection is not None, "adapt it to student and teacher first"
        ours = student[self.reads[0]]
        for parameter in self.projection.parameters():
            ours = ours.to(parameter.dtype)
            break
        return wkd_f_loss(self.projection(ours), teacher[self.needs[0]], **vars(self.options))


def _mismatch(ours: Tensor, theirs: Tensor) -> str:
    return f"loss 'wkd_f': student {tuple(ours.shape)} does not fit teacher {tuple(theirs.shape)}"
