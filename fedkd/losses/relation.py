"""The general relation loss, of which RKD, SP, DIST and VRM are special cases.

This is the formula spelt out, for trying new combinations: angles hold B^3 numbers and directions
B^2 or C^2 vectors at once. Where a combination has a loss of its own, that one is many times
faster.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.functional.relations.general import (
    LENGTHS,
    VECTORS,
    Discrepancy,
    Normalisation,
    Psi,
    Relations,
    differences,
)
from fedkd.knowledge.kinds import Kind, Logits, Pooled, VirtualLogits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.losses.kd import standardised

Vertices = Literal["samples", "classes", "samples_and_views", "classes_over_views"]
Space = Literal["logits", "probabilities", "features"]
Edges = Literal["all", "between_views"]
Reduction = Literal["mean", "edges", "elements"]


@loss_function("relation")
def relation_loss(
    student: Tensor,
    teacher: Tensor,
    student_virtual: Tensor | None = None,
    teacher_virtual: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    vertices: Vertices = "samples",
    space: Space = "logits",
    temperature: Positive = 4.0,
    standardise: bool = False,
    relation: Psi = "distance",
    edges: Edges = "all",
    normalisation: Normalisation = "none",
    distance: Discrepancy = "smooth_l1",
    delta: Positive = 1.0,
    eps: Positive = 1e-12,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean of d(psi(v_i, v_j), psi(t_i, t_j)) over relations of vertices, a scalar.

    Computed in float64 where the device has it.

    Args:
        student: Logits (B, C), or features (B, ...), flattened here.
        teacher: The teacher's, detached.
        student_virtual: The same of the virtual view, if `vertices` are over views.
        teacher_virtual: The teacher's.
        weights: This teacher's weight on each sample, (B,); ones if None. A relation of samples
            counts the geometric mean of their weights; for relations of classes the weights are
            a metric on the sample axis, and the loss is multiplied by their mean.
        class_weights: Weights of the teacher's view of each class, (C,); ones if None. A relation
            of classes counts the geometric mean of theirs.
        vertices: "samples" or "classes" (a class's vector holds its logit for each sample), alone
            or with the samples' virtual views.
        space: Where vertices lie: "logits", "probabilities" (softened) or "features" (the pooled
            vector; of samples only).
        temperature: Softness of probabilities.
        standardise: Z-score each sample's logits.
        relation: "distance", "squared_distance", "gram" (inner product), "direction" (unit vector
            from one to the other) of two vertices; "angle" (cosine at one between two others); or
            "identity", the vertex itself.
        edges: "all" pairs, or those "between_views", from real samples to virtual ones.
        normalisation: Divide distances by their "mean"; or each vertex's relations ("rows") by
            their length.
        distance: Of a student's relation from the teacher's: "smooth_l1", "huber" or "squared",
            summed over the elements of a vector; for vectors also "cosine" or "pearson".
        delta: Where smooth L1 and Huber turn linear.
        eps: Smallest squared distance.
        reduction: "mean" over all relations, of a vertex with itself too; "edges" without those;
            "elements" averages over the elements of vectors as well.
    """
    _check(vertices, space, standardise, relation, edges, normalisation, distance, reduction)
    size = len(student)
    for one in (student, student_virtual):
        if one is not None:
            check_batch(
                "relation",
                one,
                teacher,
                teacher_virtual,
                weights=weights,
                class_weights=class_weights if vertices.startswith("classes") else None,
                classes=one.shape[-1] if space == "probabilities" else None,
            )
    if vertices.endswith("views"):
        if student_virtual is None or teacher_virtual is None:
            raise ValueError(f"loss 'relation': vertices {vertices!r} need a virtual view")
        student = torch.cat([student, student_virtual])
        teacher = torch.cat([teacher, teacher_virtual])
    x = _placed(student, space, temperature, standardise)
    y = _placed(teacher.detach(), space, temperature, standardise)
    if relation in VECTORS and x.shape != y.shape:
        raise ValueError(
            f"loss 'relation': relation {relation!r} compares vectors of one length, "
            f"got {x.shape[1]} and {y.shape[1]}"
        )
    w = x.new_ones(size) if weights is None else weights.detach().to(x.dtype)
    w = w.repeat(len(x) // size)
    # What a constant vector looks like; it is not ones where coordinates are weighted.
    constant, class_trust, scale = x.new_ones(x.shape[1]), w, x.new_ones(())
    if vertices.startswith("classes"):
        scale = w.mean()
        constant = torch.where(scale > 0, w / scale, 1).sqrt()
        x, y = (x * constant[:, None]).T, (y * constant[:, None]).T
        class_trust = (
            x.new_ones(len(x)) if class_weights is None else class_weights.detach().to(x.dtype)
        )
    graph = Relations(relation, normalisation, len(x) // 2 if edges != "all" else 0, eps)
    share = graph.share(class_trust)
    apart = differences(graph.between(x, share), graph.between(y, share), distance, delta, constant)
    if apart.ndim > share.ndim:
        apart = apart.sum(dim=-1)
    if reduction == "elements":
        apart = apart / x.shape[1]
    count = share.numel()
    if relation != "identity" and reduction != "mean" and edges == "all":
        share, count = share - share.diag().diag(), count - len(share)
    return (scale * (share * apart).sum() / max(count, 1)).to(
        torch.promote_types(student.dtype, torch.float32)
    )


@LOSSES.register("relation")
class RelationLoss(DistillationLoss, formula=relation_loss):
    """Matches relations of your choice between vertices of your choice.

    The general form of relation-based distillation; `rkd`, `sp`, `dist` and `vrm` are fast
    special cases.

    References:
        Yang et al., "Categories of Response-Based, Feature-Based, and Relation-Based Knowledge
            Distillation", 2023, https://arxiv.org/abs/2306.10687
    """

    needs: tuple[Kind, ...] = (Logits(),)

    def __init__(self, **formula: Any) -> None:
        super().__init__(**formula)
        _check(**vars(self.options))
        if self.options.space == "features":
            self.needs = (Pooled(),)
        elif self.options.vertices.endswith("views"):
            self.needs = (Logits(), VirtualLogits(0))

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Scalar loss, `weights` applied."""
        kind, *virtual = self.needs
        return relation_loss(
            student[kind],
            teacher[kind],
            *(side[view] for view in virtual for side in (student, teacher)),
            weights=weights.samples,
            class_weights=weights.classes,
            **vars(self.options),
        )


def _check(
    vertices: Vertices,
    space: Space,
    standardise: bool,
    relation: Psi,
    edges: Edges,
    normalisation: Normalisation,
    distance: Discrepancy,
    reduction: Reduction,
    **_numbers: float,
) -> None:
    """Raise `ValueError` for options that do not go together."""

    def refuse(what: str, possible: str) -> None:
        raise ValueError(f"loss 'relation': {what}; possible: {possible}")

    if space == "features" and vertices != "samples":
        refuse(f"space 'features' has no vertices {vertices!r}", "samples")
    if standardise and space != "logits":
        refuse(f"space {space!r} cannot be standardised", "space 'logits'")
    if distance in ("cosine", "pearson") and relation not in VECTORS:
        refuse(
            f"distance {distance!r} compares vectors, relation {relation!r} is a number",
            "distance smooth_l1, huber, squared, or relation identity, direction",
        )
    if normalisation == "mean" and relation not in LENGTHS:
        refuse(f"normalisation 'mean' is for {LENGTHS}, not {relation!r}", "none")
    if normalisation == "rows" and relation not in (*LENGTHS, "gram"):
        refuse(f"relation {relation!r} has no rows of numbers", "normalisation none")
    if edges == "between_views" and (
        vertices != "samples_and_views" or relation in ("identity", "angle")
    ):
        refuse(
            f"edges 'between_views' do not go with vertices {vertices!r} and {relation!r}",
            "vertices samples_and_views, and a relation of two",
        )
    if reduction == "edges" and relation in ("identity", "angle"):
        refuse(f"reduction 'edges' is for relations of two, not {relation!r}", "mean")
    if reduction == "elements" and relation not in VECTORS:
        refuse(f"relation {relation!r} has no elements", "mean, edges")


def _placed(views: Tensor, space: Space, temperature: float, standardise: bool) -> Tensor:
    """Where the samples lie, (N, D)."""
    points = views.flatten(1)
    points = points.float() if points.device.type == "mps" else points.double()
    if space == "probabilities":
        return (points / temperature).softmax(dim=1)
    return standardised(points) if standardise else points
