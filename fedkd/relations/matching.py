"""A student's edges held against a teacher's: one number and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedkd.closed_form import wanted, with_gradient
from fedkd.relations.gram import SHORTEST, centred, cosines, wide

# Between two unit edges e and f, summed over their elements:
# cosine      1 - cos = |e - f|^2 / 2.
# squared     |e - f|^2 = 2 - 2 cos.
# huber       Huber of each element: `cosine`, unless elements differ by more than delta.
# edge_huber  Huber of the length |e - f|.
# masked      Half the squares of the elements that differ by at most delta.
Distance = Literal["cosine", "squared", "huber", "edge_huber", "masked"]

# Elements of the edge tensor that are held at once where edges are written out: 1 MiB in
# float32, which stays in cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class Graph:
    """The teacher's vertices, and how the student's edges are held against its edges.

    Attributes:
        vertices: (N, d).
        lefts: How many of them edges start from. They end at the others, or, if there are no
            others, at the same ones, and then no vertex has an edge to itself.
        twins: Whether the second half are other views of the first, and may lie close to them.
        metric: What the student's coordinates are multiplied by, (d,), or None.
        columns: Whether the vertices are columns of the student's logits, not rows.
        share: How much each edge counts, (n, m), or one number for all; symmetric where edges go
            both ways.
        distance: Between two edges.
        delta: Where the Huber distances turn linear.
    """

    vertices: Tensor
    lefts: int
    twins: bool
    metric: Tensor | None
    columns: bool
    share: Tensor | float
    distance: Distance
    delta: float

    def weighted(self, weight: float) -> Graph:
        """The graph, counting `weight` times as much."""
        return replace(self, share=self.share * weight)

    def of(self, student: Tensor) -> Tensor:
        """The student's vertices, (N, d)."""
        vertices = student.T if self.columns else student
        return vertices if self.metric is None else vertices * self.metric

    def solve(self, student: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Value of the graph and its gradient by the student's logits."""
        solve = _written_out if self.distance in ("huber", "masked") else _gram
        value, gradient = solve(self.of(student), self, differentiate)
        if gradient is not None:
            if self.metric is not None:
                gradient *= self.metric
            gradient = gradient.T if self.columns else gradient
        return value, gradient


def match(student: Tensor, *graphs: Graph) -> Tensor:
    """Sum of the distances of all edges of all graphs, (N, C) -> scalar."""
    value, gradient = solve(student.detach(), graphs, wanted(student))
    return with_gradient(student, value, gradient)


def solve(
    student: Tensor, graphs: Sequence[Graph], differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Value of all graphs and its gradient by the student's logits, in their precision."""
    # Half-precision Gram matrices would be worthless, so autocast keeps out.
    with torch.autocast(student.device.type, enabled=False):
        found = [graph.solve(student, differentiate) for graph in graphs]
    value = torch.stack([part for part, _ in found]).sum() if found else student.new_zeros(())
    if not differentiate:
        return value.to(student.dtype), None
    slopes = [slope for _, slope in found if slope is not None]
    gradient = slopes[0] if slopes else torch.zeros_like(student)
    for slope in slopes[1:]:
        gradient = gradient + slope
    return value.to(student.dtype), gradient.to(student.dtype)


def _gram(student: Tensor, graph: Graph, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of share * distance over edges, and its gradient by the vertices."""
    edges = cosines(student, graph.vertices, graph.lefts, graph.twins)
    if graph.distance != "edge_huber":
        return edges.solve(graph.share, differentiate)
    # For r = sqrt(2 - 2 cos) beyond delta: delta * r - delta^2 / 2, whose slope by 1 - cos is
    # delta / r. So the edge counts that much less, and the value is put right afterwards.
    length = edges.distances().mul_(2).clamp_(min=0).sqrt_()
    slope = (graph.delta / length).clamp_(max=1)
    bent = (length - graph.delta).clamp_(min=0).mul_(graph.share).sum() * (graph.delta / 2)
    value, gradient = edges.solve(slope.mul_(graph.share), differentiate)
    return value + bent, gradient


def _written_out(
    student: Tensor, graph: Graph, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_gram`, for distances that look at single elements.

    The edges are written out, some rows at a time; their differences do not cancel as Gram
    matrices do, and float32 stays float32.
    """
    vertices, origin = centred(student, graph.vertices, wide(student).dtype)
    n, own = graph.lefts, graph.lefts == len(student)
    reach = torch.add((vertices * vertices).sum(dim=2), origin[:, None], alpha=0.5)
    ends = slice(0, n) if own else slice(n, None)
    right, right_reach = vertices[:, ends], reach[:, ends]
    value = vertices.new_zeros(())
    gradient = torch.zeros_like(vertices[0])
    step = max(1, _BLOCK // max(1, right[0].numel()))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        difference = vertices[:, rows, None] - right[:, None]
        square = (difference * difference).sum(dim=3)
        short = square <= SHORTEST**2 * (reach[:, rows, None] + right_reach[:, None])
        inverse = square.rsqrt_().masked_fill_(short, 0)
        edge = difference.mul_(inverse[..., None])
        gap = edge[0] - edge[1]
        if graph.distance == "masked":
            pull = gap.masked_fill_(gap.abs() > graph.delta, 0)
            height = (gap * gap).sum(dim=2)
        else:
            # Beyond delta a line: half of x^2, less half the square of what is beyond.
            pull = gap.clamp(-graph.delta, graph.delta)
            height = (gap * gap).sum(dim=2) - gap.sub_(pull).square_().sum(dim=2)
        share = graph.share
        if isinstance(share, Tensor) and share.ndim:
            share = share[rows]
        value += height.mul_(share).sum() / 2
        if differentiate:
            along = (pull * edge[0]).sum(dim=2, keepdim=True)
            pull.addcmul_(along, edge[0], value=-1).mul_((inverse[0] * share)[..., None])
            gradient[rows] += pull.sum(dim=1)
            gradient[ends] -= pull.sum(dim=0)
    return value, gradient if differentiate else None
