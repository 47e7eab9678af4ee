"""FitNets: hints from inside the teacher."""

from __future__ import annotations

import copy
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Kind, Stage
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.models.projectors import regressor

Reduction = Literal["mean", "half_sum_channel"]


@loss_function("fitnet")
def fitnet_loss(regressed: Tensor, teacher_map: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Squared distance of two maps per sample, (B, D, h, w) x (B, D, h, w) -> (B,).

    Args:
        regressed: The student's map, regressed to the shape of the teacher's.
        teacher_map: The hint.
        reduction: "mean" over all elements; the original sums squares over the D channels and
            halves them, "half_sum_channel", which is D / 2 times as much.

    Raises:
        ValueError: the shapes differ.
    """
    check_batch("fitnet", regressed, teacher_map)
    if regressed.shape != teacher_map.shape:
        raise ValueError(
            f"loss 'fitnet': the student's map is {tuple(regressed.shape)}, "
            f"the teacher's {tuple(teacher_map.shape)}"
        )
    regressed = full(regressed)
    teacher_map = teacher_map.detach().to(regressed.dtype)
    # Summing first and dividing the B sums spares backward a pass over the map.
    squares = F.mse_loss(regressed, teacher_map, reduction="none").sum(dim=(1, 2, 3))
    places = regressed.shape[2] * regressed.shape[3]
    return squares / (places * (regressed.shape[1] if reduction == "mean" else 2))


@LOSSES.register("fitnet")
class FitNetLoss(DistillationLoss, formula=fitnet_loss):
    """Matches one feature map of the student, through a small regressor, to one of the teacher.

    Args:
        stage: Which map of the student; 0 is the stem, -1 the deepest. Published is 2, which is -2
            in networks of a stem and three stages.
        teacher_stage: Which of the teacher; None takes the same.
        relu: Whether the regressor ends in a ReLU, as published. "auto" leaves it out if the
            teacher's map has negative values, which it could never meet.
        formula: Options of `fitnet_loss`.

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
            https://arxiv.org/abs/1412.6550
    """

    needs: tuple[Kind, ...] = (Stage(-2),)

    def __init__(
        self,
        *,
        stage: int = -2,
        teacher_stage: int | None = None,
        relu: bool | Literal["auto"] = "auto",
        **formula: Any,
    ) -> None:
        super().__init__(**formula)
        self.needs = (Stage(stage if teacher_stage is None else teacher_stage),)
        self.stage = stage
        self.relu: bool | Literal["auto"] = relu
        self.regressor: nn.Module | None = None

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The guided map."""
        return (Stage(self.stage),)

    def adapted(self, student: Tensors, teacher: Tensors) -> Self:
        """With a regressor from the student's shape to the teacher's."""
        ours, theirs = student[self.reads[0]], teacher[self.needs[0]]
        relu = bool((theirs >= 0).all()) if self.relu == "auto" else self.relu
        ready = copy.deepcopy(self)
        try:
            ready.regressor = regressor(ours.shape[1:], theirs.shape[1:], relu=relu)
        except ValueError as error:
            raise ValueError(f"loss 'fitnet': {error}") from None
        return ready

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        assert self.regressor is not None, "adapt it to student and teacher first"
        ours = student[self.reads[0]].to(next(self.regressor.parameters()).dtype)
        return fitnet_loss(self.regressor(ours), teacher[self.needs[0]], **vars(self.options))
