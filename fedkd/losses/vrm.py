"""Virtual relation matching."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedkd.functional.analytic_grad import (
    needs_grad,
    transformed,
    with_gradient,
    with_gradient_each,
)
from fedkd.functional.options import Positive, Share
from fedkd.functional.precision import abreast, full, full_precision
from fedkd.functional.relations import (
    Coarse,
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
from fedkd.knowledge.payload import Ensemble
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

    @full_precision
    def together(
        self, student: Tensors, ensemble: Ensemble, targets: Tensor | None
    ) -> list[Tensor] | None:
        """Scalars of each teacher, `weights` applied."""
        options, virtual, count = self.options, VirtualLogits(0), len(ensemble)
        kinds = (Logits(),) if options.edges == "real" else (Logits(), virtual)
        ours = [student[kind] for kind in kinds]
        taught = [ensemble.tensors[kind] for kind in kinds]
        if options.pruning is not None or transformed(*ours) or ours[0].shape[1] < 2:
            return None
        if not abreast(ours[0]):
            return None
        if any(not isinstance(z, Tensor) or z.shape[1:] != ours[0].shape for z in taught):
            return None
        weights, classes = ensemble.weights, ensemble.class_weights
        # A cut for each teacher, so that gradients are added up in the order of one by one.
        inputs = [full(ours[0] if len(ours) == 1 else torch.cat(ours)) for _ in range(count)]
        theirs = torch.cat([z for z in taught if isinstance(z, Tensor)], dim=1)
        student_logits, teacher_logits = comparable(inputs[0], theirs)
        stacked = student_logits.detach().expand_as(teacher_logits)
        both, grad_to_logits = paired(stacked, teacher_logits, options.standardise)
        both = both.transpose(0, 1).contiguous()
        compared: Compared = {
            "distance": options.distance,
            "delta": options.delta,
            "reduction": options.reduction,
        }
        graphs = []
        if options.sample_weight:
            graphs.append(
                sample_graph(
                    edges=options.edges,
                    sample_weights=weights,
                    **compared,
                    weight=options.sample_weight,
                )
            )
        if options.class_weight:
            graphs.append(
                class_graph(
                    sample_weights=weights.repeat(1, len(ours)),
                    class_weights=classes,
                    **compared,
                    weight=options.class_weight,
                )
            )
        try:
            value, slope = solve(both, graphs, True)
        except Coarse:
            return None
        assert slope is not None
        if value.device.type == "cpu" and not math.isfinite(value.sum()):
            return None
        if not needs_grad(inputs[0]):
            return list(value.unbind())
        return with_gradient_each(inputs, value, grad_to_logits(slope))

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
