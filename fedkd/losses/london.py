"""Lipschitz continuity guided distillation: spectral norms of the blocks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fedkd.functional.feature_statistics import spectral_norms
from fedkd.functional.options import Count, Range
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Kind, SpectralNorms, Stage
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, loss_function


@loss_function("london")
def london_loss(student_norms: Tensor, teacher_norms: Tensor, *, relative: bool = False) -> Tensor:
    """Weighted squared distance of spectral norms per sample, (B, L - 1) x (B, L - 1) -> (B,).

    Of L stages the pair (i, i + 1) weighs 2^-(L - i - 1): 1/4 and 1/2 of three stages. So later
    pairs count more, as in the published code, whatever its comment says.

    Args:
        student_norms: `features.spectral_norms` of the student's stages.
        teacher_norms: The teacher's.
        relative: Divide differences by the teacher's norm. Norms have no common scale, and grow
            with width; the published weights hold for the paper's networks only.
    """
    check_batch("london", student_norms, teacher_norms)
    if student_norms.shape != teacher_norms.shape:
        raise ValueError(
            f"loss 'london': norms of student {tuple(student_norms.shape)} and teacher "
            f"{tuple(teacher_norms.shape)} differ in number"
        )
    student_norms = full(student_norms)
    teacher_norms = teacher_norms.detach().to(student_norms.dtype)
    difference = student_norms - teacher_norms
    if relative:
        difference = difference / teacher_norms.clamp(min=1e-6)
    pairs = difference.shape[1]
    exponents = torch.arange(-pairs, 0, dtype=difference.dtype, device=difference.device)
    return difference.square() @ exponents.exp2()


@LOSSES.register("london")
class LONDONLoss(DistillationLoss, formula=london_loss):
    """Matches how much each block stretches its input, one number per pair of stages.

    This is the Lipschitz part of the paper alone; `ofd` is the other part of its objective.

    Args:
        stages: How many of the deepest stages; each pair of neighbours gives one number.
        iterations: Steps of the power iteration; published are 10 (CIFAR) and 5 (ImageNet).
        gradient: Of the student: "exact", that of the singular value, or "unrolled", through all
            iterations, as published, which takes about twice the time.
        formula: Options of `london_loss`.

    References:
        Shang et al., "Lipschitz Continuity Guided Knowledge Distillation", ICCV 2021,
            https://arxiv.org/abs/2108.12905
    """

    needs: tuple[Kind, ...] = (SpectralNorms(3, 20),)

    def __init__(
        self,
        *,
        stages: Annotated[int, Range(lambda x: x >= 2, "at least 2")] = 3,
        iterations: Count = 20,
        gradient: Literal["exact", "unrolled"] = "exact",
        **formula: Any,
    ) -> None:
        super().__init__(**formula)
        self.needs = (SpectralNorms(stages, iterations),)
        self.stages = stages
        self.iterations = iterations
        self.gradient: Literal["exact", "unrolled"] = gradient

    @property
    def reads(self) -> tuple[Kind, ...]:
        """Norms, or the maps if the gradient is to go through the iterations."""
        if self.gradient == "exact":
            return self.needs
        return tuple(Stage(index) for index in range(-self.stages, 0))

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        if self.gradient == "exact":
            norms = student[self.needs[0]]
        else:
            norms = spectral_norms(
                [student[kind] for kind in self.reads],
                iterations=self.iterations,
                gradient="unrolled",
            )
        return london_loss(norms, teacher[self.needs[0]], **vars(self.options))
