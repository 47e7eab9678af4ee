"""A student's edges held against a teacher's: one number and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkd.relations.gram import SHORTEST, Cosines, Pair, centred, compute_dtype, wide

Distance = Literal["cosine", "squared", "huber", "edge_huber", "masked"]
"""Between two unit edges e and f, summed over their elements.

- `cosine`: 1 - cos = |e - f|^2 / 2.
- `squared`: |e - f|^2 = 2 - 2 cos.
- `huber`: Huber of each element; equals `cosine` unless elements differ by more than `delta`.
- `edge_huber`: Huber of the length |e - f|.
- `masked`: half the squares of the elements that differ by at most `delta`; the others count 0.
"""
Reduction = Literal["edges", "elements"]

# Elements of the edge tensor that are held at once where edges are written out: 1 MiB in
# float32, which stays in cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class Graph:
    """The teacher's vertices, and how the student's edges are held against its edges.

    Attributes:
        left: Where edges start, (n, d).
        right: Where they end, (m, d); None if it is the same set, then no vertex has an edge to
            itself.
        partner: For each left vertex the right one that may lie very close to it, (n,), or None.
        distance: Between two edges.
        delta: Where the Huber distances turn linear.
        reduction: What the sum over all elements is divided by.
    """

    left: Tensor
    right: Tensor | None
    partner: Tensor | None
    distance: Distance
    delta: float
    reduction: Reduction

    def match(
        self, left: Tensor, right: Tensor | None, weights: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """Sum of the kept edges' weighted distances over their number (times their length)."""
        n, m = len(left), len(left if right is None else right)
        count = n * m - (n if right is None else 0)
        if keep is not None:
            count = int(keep.sum())
        if count == 0:
            return left.sum() * 0.0
        scale = (2.0 if self.distance == "squared" else 1.0) / count
        if self.reduction == "elements":
            scale /= left.shape[1]
        share: Tensor | float = scale
        if weights is not None:
            root = weights.to(compute_dtype(left)).sqrt()
            share = root[:, None] * (root * scale)
        if keep is not None:
            share = keep * share
        loss: Tensor = _Match.apply(left, right, self, share)
        return loss

    def discrepancies(self, left: Tensor, right: Tensor | None) -> Tensor:
        """1 - cos of every edge, (n, m)."""
        with torch.autocast(left.device.type, enabled=False):
            return Cosines((left, right), (self.left, self.right), self.partner).distances()


class _Match(torch.autograd.Function):
    """A scalar loss over edges.

    Being a scalar, its gradient is finished in forward, and nothing of the size of the graph
    lives until backward.
    """

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor | None, graph: Graph, share: Tensor | float
    ) -> Tensor:
        solve = _written_out if graph.distance in ("huber", "masked") else _gram
        # Half-precision Gram matrices would be worthless, so autocast keeps out.
        with torch.autocast(left.device.type, enabled=False):
            value, gradients = solve(left, right, graph, share, any(ctx.needs_input_grad))
        ctx.save_for_backward(*(None if g is None else g.to(left.dtype) for g in gradients))
        return value.to(left.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = (None if g is None else g * grad for g in ctx.saved_tensors)
        return left, right, None, None


def _gram(
    left: Tensor, right: Tensor | None, graph: Graph, share: Tensor | float, differentiate: bool
) -> tuple[Tensor, Pair]:
    """Sum of share * distance over edges; its gradients by both ends."""
    edges = Cosines((left, right), (graph.left, graph.right), graph.partner)
    if graph.distance != "edge_huber":
        return edges.solve(share, differentiate)
    # For r = sqrt(2 - 2 cos) beyond delta: delta * r - delta^2 / 2, whose slope by 1 - cos is
    # delta / r. So the edge counts that much less, and the value is put right afterwards.
    length = edges.distances().mul_(2).clamp_(min=0).sqrt_()
    slope = (graph.delta / length).clamp_(max=1)
    bent = (length - graph.delta).clamp_(min=0).mul_(share).sum() * (graph.delta / 2)
    value, gradients = edges.solve(slope.mul_(share), differentiate)
    return value + bent, gradients


def _written_out(
    left: Tensor, right: Tensor | None, graph: Graph, share: Tensor | float, differentiate: bool
) -> tuple[Tensor, Pair]:
    """As `_gram`, for distances that look at single elements.

    The edges are written out, some rows at a time; their differences do not cancel as Gram
    matrices do, and float32 stays float32.
    """
    dtype = wide(left).dtype
    a, b, origin_s = centred(left, right, dtype)
    d, e, origin_t = centred(graph.left, graph.right, dtype)
    value = a.new_zeros(())
    grad_left, grad_right = torch.zeros_like(a), torch.zeros_like(b)
    step = max(1, _BLOCK // max(1, b.numel()))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        edge, inverse = _unit_edges(a[rows], b, origin_s)
        gap = edge - _unit_edges(d[rows], e, origin_t)[0]
        if graph.distance == "masked":
            gap = torch.where(gap.abs() <= graph.delta, gap, 0)
            pull, beyond = gap, 0.0
        else:
            # Beyond delta a line: half of x^2, less half the square of what is beyond.
            pull = gap.clamp(-graph.delta, graph.delta)
            beyond = (gap - pull).square_().sum(dim=-1)
        part = share[rows] if isinstance(share, Tensor) else share
        value += ((gap.square().sum(dim=-1) - beyond) * part).sum() / 2
        if differentiate:
            pull = pull - (pull * edge).sum(dim=-1, keepdim=True) * edge
            pull *= (inverse * part)[..., None]
            grad_left[rows] = pull.sum(dim=1)
            grad_right -= pull.sum(dim=0)
    if not differentiate:
        return value, (None, None)
    return value, (grad_left.mul_(2), None) if right is None else (grad_left, grad_right)


def _unit_edges(a: Tensor, b: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Edges (n, m, d) and the inverse of their lengths (n, m), 0 where an edge is zero."""
    difference = a[:, None] - b
    square = difference.square().sum(dim=-1)
    reach = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) + origin
    inverse = torch.where(square > SHORTEST**2 * reach, square.rsqrt(), 0)
    return difference.mul_(inverse[..., None]), inverse
