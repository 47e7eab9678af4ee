"""The sample graph and the class graph: which vertices, which edges, how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.relations.matching import Distance, Graph, Reduction
from fedkd.relations.pruning import Edges, Pruning, check_views, edge_scores, ends, smallest


def sample_relation_loss(
    student_real: Tensor,
    student_virtual: Tensor | None,
    teacher_real: Tensor,
    teacher_virtual: Tensor | None,
    *,
    edges: Edges = "real_virtual",
    pruning: Pruning | None = None,
    rho: float = 0.1,
    sample_weights: Tensor | None = None,
    distance: Distance = "cosine",
    delta: float = 1.0,
    reduction: Reduction = "edges",
    judged: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Mean distance between the edges of two sample graphs, four times (B, C) -> scalar.

    The edge from m to n is (z_m - z_n) / |z_m - z_n|, and 0 if both ends are the same. Each edge
    counts sqrt(w_m * w_n), so one that the teacher does not know at both ends fades; the sum is
    divided by the number of edges and not by their weight, so that over teachers whose weights
    sum to one no edge counts more than once.

    Args:
        student_real: Vertices of the real view; gradients flow to the student's alone.
        student_virtual: Vertices of the virtual view; may be None if `edges` is "real".
        teacher_real: The teacher's.
        teacher_virtual: The teacher's.
        edges: From each real to each virtual vertex (m to m's own view included), between all
            2B vertices, or between real vertices.
        pruning: Rule that calls edges unreliable, or None; see `edge_scores`.
        rho: Share of the edges to prune; equal scores at the border all stay.
        sample_weights: This teacher's weight on each sample, (B,); ones if None.
        distance: Between two edges; see `Distance`.
        delta: Where the Huber distances turn linear.
        reduction: "edges" sums over the elements of an edge and averages over edges;
            "elements" averages over both.
        judged: Student logits of both views that `pruning` judges, where the vertices are
            something else (standardised, say).
    """
    own = edges != "real_virtual"
    check_views(edges, student_virtual, teacher_virtual)
    left, right = ends(student_real, student_virtual, edges)
    teacher_left, teacher_right = ends(teacher_real, teacher_virtual, edges)
    weights = None if sample_weights is None else sample_weights.detach()
    if edges == "full" and weights is not None:
        weights = torch.cat([weights, weights])
    graph = Graph(
        teacher_left.detach(),
        None if own else teacher_right.detach(),
        partner=_partner(left, edges),
        distance=distance,
        delta=delta,
        reduction=reduction,
    )
    keep = None
    if pruning is not None:
        with torch.no_grad():
            if pruning == "edge_discrepancy":
                scores = graph.discrepancies(left, None if own else right)
            else:
                scores = edge_scores(*(judged or (student_real, student_virtual)), pruning, edges)
            keep = smallest(scores, rho, own=own)
    return graph.match(left, None if own else right, weights, keep)


def class_relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    distance: Distance = "cosine",
    delta: float = 1.0,
    reduction: Reduction = "edges",
) -> Tensor:
    """Mean distance between the edges of two class graphs, (N, C) x (N, C) -> scalar.

    Class k's vertex is column k; edges join all pairs of classes.

    Args:
        student: Logits, real and virtual view one below the other.
        teacher: The teacher's; detached.
        sample_weights: This teacher's weight on each row, (N,): a metric on the sample axis
            (coordinates times sqrt(w)), and the loss is multiplied by their mean.
        class_weights: Trust in the teacher's view of each class, (C,); an edge counts
            sqrt(c_k * c_l).
        distance: As in `sample_relation_loss`.
        delta: Where the Huber distances turn linear.
        reduction: As in `sample_relation_loss`.
    """
    teacher = teacher.detach()
    scale: Tensor | None = None
    if sample_weights is not None:
        metric = sample_weights.detach().to(student.dtype)
        scale, root = metric.mean(), metric.sqrt()[:, None]
        student, teacher = student * root, teacher * root
    graph = Graph(
        teacher.T, None, partner=None, distance=distance, delta=delta, reduction=reduction
    )
    weights = None if class_weights is None else class_weights.detach()
    loss = graph.match(student.T, None, weights, None)
    return loss if scale is None else scale * loss


def _partner(left: Tensor, edges: Edges) -> Tensor | None:
    """Index of each vertex's other view among the right vertices."""
    if edges == "real":
        return None
    own = torch.arange(len(left), device=left.device)
    return own if edges == "real_virtual" else own.roll(len(left) // 2)
