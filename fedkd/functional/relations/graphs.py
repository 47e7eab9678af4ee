"""The sample graph and the class graph: which vertices, which edges, how much each counts."""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from fedkd.functional.options import Share
from fedkd.functional.precision import full, full_precision
from fedkd.functional.relations.gram import cosines
from fedkd.functional.relations.matching import Distance, Edges, Graph, Reduction
from fedkd.functional.relations.pruning import Pruning, edge_scores, smallest


class Compared(TypedDict, total=False):
    """How the edges of a graph are compared; see `Graph`."""

    distance: Distance
    delta: float
    reduction: Reduction


def sample_graph(
    *,
    edges: Edges = "real_virtual",
    sample_weights: Tensor | None = None,
    keep: Tensor | None = None,
    weight: float = 1.0,
    **compared: Unpack[Compared],
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
        weight: How much the graph counts.
        compared: How edges are compared.
    """
    weights = None if sample_weights is None else sample_weights.detach()
    if weights is not None and edges != "real":
        weights = torch.cat([weights, weights], dim=-1)
    return Graph(columns=False, edges=edges, weights=weights, keep=keep, weight=weight, **compared)


def class_graph(
    *,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    weight: float = 1.0,
    **compared: Unpack[Compared],
) -> Graph:
    """The graph between classes, to be matched on logits (N, C), views one below the other.

    Class k's vertex is column k; edges join all pairs of classes.

    Args:
        sample_weights: This teacher's weight on each row, (N,): a metric on the sample axis
            (coordinates times sqrt(w)), and the graph is multiplied by their mean.
        class_weights: Weights of the teacher's view of each class, (C,); an edge counts
            sqrt(c_k * c_l).
        weight: How much the graph counts.
        compared: How edges are compared.
    """
    weights = None if class_weights is None else class_weights.detach()
    metric = None if sample_weights is None else sample_weights.detach()
    return Graph(
        columns=True, edges="real", weights=weights, metric=metric, weight=weight, **compared
    )


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
