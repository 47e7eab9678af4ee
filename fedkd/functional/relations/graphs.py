"""The sample graph and the class graph: which vertices, which edges, how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.functional.options import Positive, Share, options_checked
from fedkd.functional.precision import full, full_precision
from fedkd.functional.relations.gram import cosines
from fedkd.functional.relations.matching import Distance, Edges, Graph, Reduction, match
from fedkd.functional.relations.pruning import Pruning, edge_scores, smallest


def sample_graph(
    *,
    edges: Edges = "real_virtual",
    sample_weights: Tensor | None = None,
    keep: Tensor | None = None,
    distance: Distance = "cosine",
    delta: Positive = 1.0,
    reduction: Reduction = "edges",
    weight: float = 1.0,
) -> Graph:
    """The graph between samples, to be matched on logits of the real, then the virtual view.

    The edge from m to n is (z_m - z_n) / |z_m - z_n|, and 0 if both ends are the same. Each edge
    counts sqrt(w_m * w_n), so one that the teacher does not know at both ends fades; the sum is
    divided by the number of edges and not by their weight, so that over teachers whose weights
    sum to one no edge counts more than once.

    Args:
        edges: From each real to each virtual vertex (m to m's own view included), between all
            2B vertices, or between real vertices; then there is no virtual view.
        sample_weights: This teacher's weight on each sample, (B,); ones if None.
        keep: Edges that count, booleans (n, m); all if None.
        distance: Between two edges; see `Distance`.
        delta: Where the Huber distances turn linear.
        reduction: "edges" sums over the elements of an edge and averages over edges;
            "elements" averages over both.
        weight: How much the graph counts.
    """
    weights = None if sample_weights is None else sample_weights.detach()
    if weights is not None and edges != "real":
        weights = weights.repeat(2)
    return Graph(
        columns=False,
        edges=edges,
        weights=weights,
        keep=keep,
        distance=distance,
        delta=delta,
        reduction=reduction,
        weight=weight,
    )


def class_graph(
    *,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    distance: Distance = "cosine",
    delta: Positive = 1.0,
    reduction: Reduction = "edges",
    weight: float = 1.0,
) -> Graph:
    """The graph between classes, to be matched on logits (N, C), views one below the other.

    Class k's vertex is column k; edges join all pairs of classes.

    Args:
        sample_weights: This teacher's weight on each row, (N,): a metric on the sample axis
            (coordinates times sqrt(w)), and the graph is multiplied by their mean.
        class_weights: Weights of the teacher's view of each class, (C,); an edge counts
            sqrt(c_k * c_l).
        distance: As in `sample_graph`, like all that follow.
        delta: See there.
        reduction: See there.
        weight: See there.
    """
    return Graph(
        columns=True,
        edges="real",
        weights=None if class_weights is None else class_weights.detach(),
        metric=None if sample_weights is None else sample_weights.detach(),
        distance=distance,
        delta=delta,
        reduction=reduction,
        weight=weight,
    )


@options_checked("sample_relation_loss")
def sample_relation_loss(
    student_real: Tensor,
    student_virtual: Tensor | None,
    teacher_real: Tensor,
    teacher_virtual: Tensor | None,
    *,
    edges: Edges = "real_virtual",
    pruning: Pruning | None = None,
    rho: Share = 0.1,
    sample_weights: Tensor | None = None,
    distance: Distance = "cosine",
    delta: Positive = 1.0,
    reduction: Reduction = "edges",
) -> Tensor:
    """Mean distance between the edges of two sample graphs, four times (B, C) -> scalar.

    Args:
        student_real: Vertices of the real view; gradients flow to the student's alone.
        student_virtual: Vertices of the virtual view; may be None if `edges` is "real".
        teacher_real: The teacher's.
        teacher_virtual: The teacher's.
        edges: As in `sample_graph`, like all that is not described here.
        pruning: Rule that calls edges unreliable, or None; see `edge_scores`.
        rho: Share of the edges to prune.
        sample_weights: See there.
        distance: See there.
        delta: See there.
        reduction: See there.
    """
    student = both_views(student_real, student_virtual, edges)
    teacher = both_views(teacher_real, teacher_virtual, edges)
    keep = None
    if pruning is not None:
        judged = student_real, student_virtual
        keep = reliable(student, teacher, judged, rule=pruning, rho=rho, edges=edges)
    graph = sample_graph(
        edges=edges,
        sample_weights=sample_weights,
        keep=keep,
        distance=distance,
        delta=delta,
        reduction=reduction,
    )
    return match(student, teacher, graph)


@options_checked("class_relation_loss")
def class_relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    distance: Distance = "cosine",
    delta: Positive = 1.0,
    reduction: Reduction = "edges",
) -> Tensor:
    """Mean distance between the edges of two class graphs, (N, C) x (N, C) -> scalar.

    Args:
        student: Logits, real and virtual view one below the other.
        teacher: The teacher's; detached.
        sample_weights: As in `class_graph`, like all that follow.
        class_weights: See there.
        distance: See there.
        delta: See there.
        reduction: See there.
    """
    graph = class_graph(
        sample_weights=sample_weights,
        class_weights=class_weights,
        distance=distance,
        delta=delta,
        reduction=reduction,
    )
    return match(student, teacher, graph)


@torch.no_grad()
@full_precision
def reliable(
    student: Tensor,
    teacher: Tensor,
    judged: tuple[Tensor, Tensor | None],
    *,
    rule: Pruning,
    rho: Share = 0.1,
    edges: Edges = "real_virtual",
) -> Tensor:
    """Which edges of the sample graph stay when the least reliable go, (n, m) of booleans.

    Args:
        student: Its vertices, real before virtual.
        teacher: The teacher's.
        judged: The student's logits of both views, which the rule judges; the vertices may be
            something else (standardised, for example).
        rule: See `edge_scores`.
        rho: Share of the edges to prune; equal scores at the border all stay.
        edges: As in `sample_graph`.
    """
    if rule == "edge_discrepancy":
        both = full(torch.stack([student, teacher.to(student.dtype)]))
        graph = sample_graph(edges=edges)
        scores = cosines(both, graph.sources(both), graph.view_pairs).distances()
    else:
        scores = edge_scores(*judged, rule, edges)
    return smallest(scores, rho, own=edges != "real_virtual")


def both_views(real: Tensor, virtual: Tensor | None, edges: Edges) -> Tensor:
    """All vertices, (B, C) or (2B, C). Raises `ValueError` if `edges` lead to a missing view."""
    if edges == "real":
        return real
    if virtual is None:
        raise ValueError(f"edges {edges!r} need a virtual view of student and teacher")
    return torch.cat([real, virtual])
