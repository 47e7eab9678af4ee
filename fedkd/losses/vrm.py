"""Virtual relation matching."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, Tensors, Trust
from fedkd.losses.kd import standardised
from fedkd.relations import (
    Distance,
    Edges,
    Pruning,
    class_relation_loss,
    sample_relation_loss,
)


def vrm_loss(
    student_real: Tensor,
    student_virtual: Tensor | None,
    teacher_real: Tensor,
    teacher_virtual: Tensor | None,
    *,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    sample_weight: float = 1.0,
    class_weight: float = 0.25,
    standardise: bool = True,
    edges: Edges = "real_virtual",
    pruning: Pruning | None = None,
    rho: float = 0.1,
    distance: Distance = "cosine",
    delta: float = 1.0,
) -> Tensor:
    """sample_weight * L_sample + class_weight * L_class, four times (B, C) -> scalar.

    Args:
        student_real: Logits of the real view; half precision is computed in float32.
        student_virtual: Logits of the virtual view; unused if `edges` is "real".
        teacher_real: The teacher's, detached.
        teacher_virtual: The teacher's, detached.
        weights: This teacher's weight on each sample, (B,); ones if None.
        class_weights: Trust in the teacher's view of each class, (C,); ones if None.
        sample_weight: As in `VRMLoss`, like all that follow.
        class_weight: See there.
        standardise: See there.
        edges: See there.
        pruning: See there.
        rho: See there.
        distance: See there.
        delta: See there.
    """
    # Without virtual vertices the class graph leaves them out too: the loss must not change
    # because another loss has asked for views.
    views = [(student_real, teacher_real)]
    if edges != "real":
        if student_virtual is None or teacher_virtual is None:
            raise ValueError(f"edges {edges!r} need a virtual view of student and teacher")
        views.append((student_virtual, teacher_virtual))
    student = [_float(s) for s, _ in views]
    teacher = [_float(t.detach()).to(student[0].dtype) for _, t in views]
    judged = (student[0], student[1] if len(views) > 1 else None)
    if standardise:
        student, teacher = [standardised(s) for s in student], [standardised(t) for t in teacher]
    total = student[0].new_zeros(())
    if sample_weight:
        total = total + sample_weight * sample_relation_loss(
            student[0],
            student[1] if len(views) > 1 else None,
            teacher[0],
            teacher[1] if len(views) > 1 else None,
            edges=edges,
            pruning=pruning,
            rho=rho,
            sample_weights=weights,
            distance=distance,
            delta=delta,
            judged=judged,
        )
    if class_weight:
        total = total + class_weight * class_relation_loss(
            torch.cat(student),
            torch.cat(teacher),
            sample_weights=None if weights is None else weights.repeat(len(views)),
            class_weights=class_weights,
            distance=distance,
            delta=delta,
        )
    return total


@LOSSES.register("vrm")
class VRMLoss(DistillationLoss):
    """Matches how samples and classes lie to each other over a real and a virtual view.

    The official code could not be read. Edges follow the published formulas; reduction (sum over
    the vector, mean over edges), both weights and the pruning rules are ours.

    Args:
        sample_weight: Weight of the graph between samples (the paper's alpha; value ours).
        class_weight: Weight of the graph between classes (the paper's beta; value ours).
        standardise: Z-score each sample's logits first.
        edges: Sample edges: "real_virtual", "full" or "real". "real" needs no virtual view and
            uses none in the class graph either.
        pruning: Rule that drops unreliable sample edges anew each batch, or None.
        rho: Share of the edges to drop.
        distance: "cosine" (cheap), or elementwise "huber" as published (equal unless elements of
            edges differ by more than `delta`, which with many classes they do not).
        delta: Where Huber turns linear.

    References:
        Zhang et al., "VRM: Knowledge Distillation via Virtual Relation Matching", ICCV 2025,
            https://arxiv.org/abs/2502.20760
    """

    needs: tuple[Kind, ...] = (Logits(), VirtualLogits(0))

    def __init__(
        self,
        *,
        sample_weight: float = 1.0,
        class_weight: float = 0.25,
        standardise: bool = True,
        edges: Edges = "real_virtual",
        pruning: Pruning | None = None,
        rho: float = 0.1,
        distance: Distance = "cosine",
        delta: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= rho < 1:
            raise ValueError(f"loss 'vrm': rho must be in [0, 1), got {rho}")
        if delta <= 0:
            raise ValueError(f"loss 'vrm': delta must be positive, got {delta}")
        if edges == "real":
            if pruning == "view_discrepancy":
                raise ValueError(
                    "loss 'vrm': pruning 'view_discrepancy' compares two views, "
                    "but edges 'real' use one"
                )
            self.needs = (Logits(),)
        self.sample_weight = sample_weight
        self.class_weight = class_weight
        self.standardise = standardise
        self.edges: Edges = edges
        self.pruning: Pruning | None = pruning
        self.rho = rho
        self.distance: Distance = distance
        self.delta = delta

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: Trust
    ) -> Tensor:
        """Scalar loss, `trust` applied."""
        virtual = VirtualLogits(0)
        return vrm_loss(
            student[Logits()],
            student.get(virtual),
            teacher[Logits()],
            teacher.get(virtual),
            weights=trust.samples,
            class_weights=trust.classes,
            sample_weight=self.sample_weight,
            class_weight=self.class_weight,
            standardise=self.standardise,
            edges=self.edges,
            pruning=self.pruning,
            rho=self.rho,
            distance=self.distance,
            delta=self.delta,
        )


def _float(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
