"""A student's edges held against a teacher's: one number and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedkd.functional.analytic_grad import with_gradient
from fedkd.functional.precision import full, full_precision
from fedkd.functional.relations.general import CLOSEST, squares
from fedkd.functional.relations.gram import SHORTEST, Coarse, centred, cosines

Edges = Literal["real_virtual", "full", "real"]
# Between two unit edges e and f, summed over their elements:
# cosine      1 - cos = |e - f|^2 / 2.
# squared     |e - f|^2 = 2 - 2 cos.
# huber       Huber of each element: `cosine`, unless elements differ by more than delta.
# edge_huber  Huber of the length |e - f|.
# masked      Half the squares of the elements that differ by at most delta.
Distance = Literal["cosine", "squared", "huber", "edge_huber", "masked"]
Reduction = Literal["edges", "elements"]

# Elements of the edge tensor that are held at once where edges are written out: 1 MiB in
# float32, which stays in cache.
_BLOCK = 2**18

Found = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Graph:
    """Which edges there are between rows (or columns) of the logits, and how they are compared.

    Attributes:
        columns: Whether the vertices are columns, not rows.
        edges: "real" joins all vertices; "full" as well, and knows that the second half are
            other views of the first; "real_virtual" joins each of the first half to each of the
            second. No vertex has an edge to itself.
        weights: Of each vertex, (..., N); an edge counts the root of their product.
        metric: Weights of the vertices' coordinates, (..., d); the graph counts their mean.
        keep: Edges that count, booleans (n, m); all if None.
        distance: Between two edges.
        delta: Where the Huber distances turn linear.
        reduction: Whether to average over edges, or over all elements of edges.
        weight: How much the graph counts.
    """

    columns: bool
    edges: Edges
    weights: Tensor | None = None
    metric: Tensor | None = None
    keep: Tensor | None = None
    distance: Distance = "cosine"
    delta: float = 1.0
    reduction: Reduction = "edges"
    weight: float = 1.0

    @property
    def view_pairs(self) -> bool:
        """Whether some edges join two views of the same thing, which may lie close."""
        return self.edges != "real"

    def sources(self, vertices: Tensor) -> int:
        """How many of the vertices (..., 2, N, d) edges start from."""
        return vertices.shape[-2] // (2 if self.edges == "real_virtual" else 1)

    def vertices(self, both: Tensor) -> Tensor:
        """Of student and teacher, (..., 2, N, C) -> (..., 2, N, d); of one, (N, C) -> (N, d)."""
        vertices = both.mT if self.columns else both
        if self.metric is None:
            return vertices
        root = self.metric.to(both.dtype).sqrt()
        return vertices * (root if root.ndim == 1 else root[..., None, None, :])

    def share(self, vertices: Tensor) -> Tensor | float:
        """How much each edge counts, (n, m), or one number for all."""
        size, length = vertices.shape[-2:]
        n = self.sources(vertices)
        count: Tensor | int = max(n * (n - 1) if n == size else n * (size - n), 1)
        if self.keep is not None:
            count = self.keep.sum().clamp(min=1).to(vertices.dtype)
            count = int(count) if count.device.type == "cpu" else count  # others shall not wait
        scale = self.weight * (2 if self.distance == "squared" else 1) / count
        share: Tensor | float = scale / length if self.reduction == "elements" else scale
        if self.metric is not None:
            mean = self.metric.to(vertices.dtype).mean(dim=-1)
            share = share * (mean[..., None, None] if mean.ndim else mean)
        if self.weights is not None:
            root = self.weights.to(vertices.dtype).sqrt()
            ends = root if n == size else root[..., n:]
            share = root[..., :n, None] * ends[..., None, :] * share
        return share if self.keep is None else self.keep.to(vertices.dtype) * share

    def solve(self, both: Tensor, differentiate: bool) -> Found:
        """Value, and gradient by the student's logits (..., N, C), for both, (..., 2, N, C).

        Raises:
            Coarse: several pairs do not go together.
        """
        vertices = self.vertices(both)
        if both.ndim > 3 and (self.keep is not None or self.distance not in ("cosine", "squared")):
            raise Coarse
        solve = _written_out if self.distance in ("huber", "masked") else _gram
        value, gradient = solve(vertices, self, self.share(vertices), differentiate)
        if gradient is not None:
            if self.metric is not None:
                root = self.metric.to(both.dtype).sqrt()
                gradient *= root if root.ndim == 1 else root[..., None, :]
            gradient = gradient.mT if self.columns else gradient
        return value, gradient

    def formula(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The value for student's and teacher's logits (N, C), edges written out, for autograd."""
        wide = student.dtype if student.device.type == "mps" else torch.float64
        vertices = [self.vertices(z.to(wide)) for z in (student, teacher)]
        share = self.share(vertices[0][None])
        gap = self._edges(vertices[0]) - self._edges(vertices[1])
        if self.distance == "huber":
            bent = gap.clamp(-self.delta, self.delta)
            height = (bent * (gap - bent / 2)).sum(dim=2)
        elif self.distance == "masked":
            height = torch.where(gap.abs() > self.delta, 0, gap).square().sum(dim=2) / 2
        else:
            height = gap.square().sum(dim=2) / 2
        if self.distance == "edge_huber":
            long = height > self.delta**2 / 2
            length = torch.where(long, 2 * height, 1).sqrt()
            height = torch.where(long, self.delta * (length - self.delta / 2), height)
        return (share * height).sum().to(student.dtype)

    def _edges(self, vertices: Tensor) -> Tensor:
        """Unit vectors from one vertex to another, 0 where these are the same, (n, m, d)."""
        n = self.sources(vertices[None])
        left = vertices[:n]
        right = left if n == len(vertices) else vertices[n:]
        none = (squares(left, right) == 0)[..., None]
        edges = left[:, None] - right
        square = edges.square().sum(dim=2, keepdim=True)
        none = none | (square == 0)
        return torch.where(none, 0, edges * torch.where(none, 1, square).rsqrt())


@full_precision
def match(student: Tensor, teacher: Tensor, *graphs: Graph) -> Tensor:
    """Sum of the distances of all edges of all graphs, (N, C) x (N, C) -> scalar."""
    student = full(student)
    teacher = teacher.detach().to(student.dtype)
    return with_gradient(
        student,
        lambda logits, differentiate: solve(torch.stack([logits, teacher]), graphs, differentiate),
        lambda logits: formula(logits, teacher, graphs),
    )


def formula(student: Tensor, teacher: Tensor, graphs: Sequence[Graph]) -> Tensor:
    """As `match`, for autograd."""
    value = student.new_zeros(())
    for graph in graphs:
        value = value + graph.formula(student, teacher)
    return value


def solve(both: Tensor, graphs: Sequence[Graph], differentiate: bool) -> Found:
    """As `match`, for student and teacher in one tensor (2, N, C), with its gradient (N, C).

    Several pairs may lie side by side, (..., 2, N, C).

    Raises:
        Coarse: several pairs do not go together.
    """
    found = [graph.solve(both, differentiate) for graph in graphs]
    value = both.new_zeros(both.shape[:-3])
    for part, _ in found:
        value = value + part.to(both.dtype)
    if not differentiate:
        return value, None
    slopes = [slope.to(both.dtype) for _, slope in found if slope is not None]
    gradient = slopes[0] if slopes else torch.zeros_like(both[..., 0, :, :])
    for slope in slopes[1:]:
        gradient = gradient + slope
    return value, gradient


def _gram(vertices: Tensor, graph: Graph, share: Tensor | float, differentiate: bool) -> Found:
    """Sum of share * distance over edges, and its gradient by the student's vertices."""
    edges = cosines(vertices, graph.sources(vertices), graph.view_pairs)
    if graph.distance != "edge_huber":
        return edges.solve(share, differentiate)
    # For r = sqrt(2 - 2 cos) beyond delta: delta * r - delta^2 / 2, whose slope by 1 - cos is
    # delta / r. So the edge counts that much less, and the value is put right afterwards.
    length = edges.distances().mul_(2).clamp_(min=0).sqrt_()
    slope = (graph.delta / length).clamp_(max=1)
    bent = (length - graph.delta).clamp_(min=0).mul_(share).sum() * (graph.delta / 2)
    value, gradient = edges.solve(slope.mul_(share), differentiate)
    return value + bent, gradient


def _written_out(
    vertices: Tensor, graph: Graph, share: Tensor | float, differentiate: bool
) -> Found:
    """As `_gram`, for distances that look at single elements.

    The edges are written out, some rows at a time; their differences do not cancel as Gram
    matrices do, and float32 stays float32.
    """
    vertices, origin = centred(vertices)
    n, size = graph.sources(vertices), vertices.shape[1]
    reach = torch.add((vertices * vertices).sum(dim=2), origin[:, None], alpha=0.5)
    ends = slice(0, n) if n == size else slice(n, None)
    right, right_reach = vertices[:, ends], reach[:, ends]
    value = vertices.new_zeros(())
    gradient = torch.zeros_like(vertices[0])
    step = max(1, _BLOCK // max(1, right[0].numel()))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        difference = vertices[:, rows, None] - right[:, None]
        square = (difference * difference).sum(dim=3)
        near = SHORTEST**2 * (reach[:, rows, None] + right_reach[:, None])
        short = square <= near.clamp_(min=CLOSEST)
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
        part = share[rows] if isinstance(share, Tensor) and share.ndim else share
        value += height.mul_(part).sum() / 2
        if differentiate:
            along = (pull * edge[0]).sum(dim=2, keepdim=True)
            pull.addcmul_(along, edge[0], value=-1).mul_((inverse[0] * part)[..., None])
            gradient[rows] += pull.sum(dim=1)
            gradient[ends] -= pull.sum(dim=0)
    return value, gradient if differentiate else None
