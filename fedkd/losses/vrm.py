"""Virtual relation matching."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedkd.functional.analytic_grad import with_gradient
from fedkd.functional.options import Positive, Share
from fedkd.functional.relations import (
    Compared,
    Distance,
    Edges,
    Pruning,
    Reduction,
    both_views,
    class_graph,
    formula,
    reliable,
    sample_graph,
    solve,
)
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.losses.kd import comparable, paired, standardised


@loss_function("vrm")
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
    rho: Share = 0.1,
    distance: Distance = "cosine",
    delta: Positive = 1.0,
    reduction: Reduction = "edges",
) -> Tensor:
    """sample_weight * L_sample + class_weight * L_class, four times (B, C) -> scalar.

    Args:
        student_real: Logits of the real view; half precision is computed in float32.
        student_virtual: Logits of the virtual view; unused if `edges` is "real".
        teacher_real: The teacher's, detached.
        teacher_virtual: The teacher's, detached.
        weights: This teacher's weight on each sample, (B,); ones if None.
        class_weights: Weights of the teacher's view of each class, (C,); ones if None.
        sample_weight: Weight of the graph between samples (the paper's alpha; value ours).
        class_weight: Weight of the graph between classes (the paper's beta; value ours).
        standardise: Z-score each sample's logits first.
        edges: Sample edges: "real_virtual", "full" or "real". "real" needs no virtual view and
            uses none in the class graph either.
        pruning: Rule that drops unreliable sample edges anew each batch, or None.
        rho: Share of the edges to drop.
        distance: Between a student's and the teacher's edge. "cosine" is 1 - cos; "squared" is
            twice that; "huber" is Huber of each element, as published (equal to "cosine" unless
            elements differ by more than `delta`, which with many classes they do not); "masked"
            leaves such elements out; "edge_huber" is Huber of the length of the difference.
        delta: Where Huber turns linear.
        reduction: "edges" sums over the elements of an edge and averages over edges; "elements"
            averages over both, which is C times less for samples and 2B times for classes.
    """
    for one in (student_real, student_virtual):
        if one is not None:
            check_batch(
                "vrm",
                one,
                teacher_real,
                teacher_virtual,
                weights=weights,
                class_weights=class_weights,
                classes=one.shape[-1],
            )
    # Without virtual vertices the class graph leaves them out too: the loss must not change
    # because another loss has asked for views.
    logits, taught = comparable(
        both_views(student_real, student_virtual, edges),
        both_views(teacher_real, teacher_virtual, edges),
    )
    both, grad_to_logits = paired(logits, taught, standardise)
    compared: Compared = {"distance": distance, "delta": delta, "reduction": reduction}
    graphs = []
    if sample_weight:
        keep = None
        if pruning is not None:
            judged = student_real, None if edges == "real" else student_virtual
            keep = reliable(both[0], both[1], judged, rule=pruning, rho=rho, edges=edges)
        graphs.append(
            sample_graph(
                edges=edges, sample_weights=weights, keep=keep, **compared, weight=sample_weight
            )
        )
    if class_weight:
        views = len(logits) // len(student_real)
        graphs.append(
            class_graph(
                sample_weights=None if weights is None else weights.repeat(views),
                class_weights=class_weights,
                **compared,
                weight=class_weight,
            )
        )

    def closed(_: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        value, gradient = solve(both, graphs, differentiate)
        return value, None if gradient is None else grad_to_logits(gradient)

    def plain(z: Tensor) -> Tensor:
        z, t = (standardised(v) if standardise else v for v in (z, taught))
        return formula(z, t, graphs)

    return with_gradient(logits, closed, plain)


@LOSSES.register("vrm")
class VRMLoss(DistillationLoss, formula=vrm_loss):
    """Matches how samples and classes lie to each other over a real and a virtual view.

    The official code could not be read. Edges follow the published formulas; the default
    reduction, both weights and the pruning rules are ours.

    References:
        Zhang et al., "VRM: Knowledge Distillation via Virtual Relation Matching", ICCV 2025,
            https://arxiv.org/abs/2502.20760
    """

    needs: tuple[Kind, ...] = (Logits(), VirtualLogits(0))

    def __init__(self, **formula: Any) -> None:
        super().__init__(**formula)
        if self.options.edges == "real":
            if self.options.pruning == "view_discrepancy":
                raise ValueError(
                    "loss 'vrm': pruning 'view_discrepancy' compares two views, "
                    "but edges 'real' use one"
                )
            self.needs = (Logits(),)

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Scalar loss, `weights` applied."""
        virtual = VirtualLogits(0)
        return vrm_loss(
            student[Logits()],
            student.get(virtual),
            teacher[Logits()],
            teacher.get(virtual),
            weights=weights.samples,
            class_weights=weights.classes,
            **vars(self.options),
        )
