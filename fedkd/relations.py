"""Relations between samples and between classes, matched between student and teacher.

A graph's vertices are logit vectors, its edges the unit vectors from one vertex to another. For
two unit vectors half the squared distance is one minus their cosine, and the cosines of all edges
follow from Gram matrices of the vertices. So no edge is ever written out: memory is quadratic in
the number of vertices, where the literal tensor of edges is that times their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Edges = Literal["real_virtual", "full", "real"]
Distance = Literal["cosine", "huber"]
Pruning = Literal[
    "joint_entropy_indep", "joint_entropy_diag", "edge_discrepancy", "view_discrepancy"
]

# Shorter edges, relative to their ends, are rounding and not relation: they count as zero.
_SHORTEST = 1e-6
# Elements of the edge tensor that Huber holds at once: 1 MiB in float32, which stays in cache.
_BLOCK = 2**18


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
        distance: "cosine" is 1 - cos = half the squared distance; "huber" is elementwise and
            summed over the vector, which equals "cosine" unless an element differs by more than
            `delta`.
        delta: Where Huber turns linear.
        judged: Student logits of both views that `pruning` judges, where the vertices are
            something else (standardised, say).
    """
    own = edges != "real_virtual"
    _check_views(edges, student_virtual, teacher_virtual)
    left, right = _ends(student_real, student_virtual, edges)
    teacher_left, teacher_right = _ends(teacher_real, teacher_virtual, edges)
    weights = None if sample_weights is None else sample_weights.detach()
    if edges == "full" and weights is not None:
        weights = torch.cat([weights, weights])
    graph = _Graph(
        teacher_left.detach(),
        None if own else teacher_right.detach(),
        partner=_partner(left, edges),
        distance=distance,
        delta=delta,
    )
    keep = None
    if pruning is not None:
        with torch.no_grad():
            if pruning == "edge_discrepancy":
                scores = graph.discrepancies(left, None if own else right)
            else:
                scores = edge_scores(*(judged or (student_real, student_virtual)), pruning, edges)
            keep = _smallest(scores, rho, own=own)
    return graph.match(left, None if own else right, weights, keep)


def class_relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    distance: Distance = "cosine",
    delta: float = 1.0,
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
        delta: Where Huber turns linear.
    """
    teacher = teacher.detach()
    scale: Tensor | float = 1.0
    if sample_weights is not None:
        metric = sample_weights.detach().to(student.dtype)
        scale = metric.mean()
        student, teacher = student * metric.sqrt()[:, None], teacher * metric.sqrt()[:, None]
    graph = _Graph(teacher.T, None, partner=None, distance=distance, delta=delta)
    weights = None if class_weights is None else class_weights.detach()
    return scale * graph.match(student.T, None, weights, None)


def edge_scores(
    student_real: Tensor,
    student_virtual: Tensor | None,
    rule: Pruning,
    edges: Edges = "real_virtual",
) -> Tensor:
    """Unreliability of each edge from the student's predictions, (B, C) x (B, C) -> (B, B).

    With "full" edges the result is (2B, 2B). Rules, for P and Q the probabilities at the ends:

    - `joint_entropy_indep`: H(P) + H(Q).
    - `joint_entropy_diag`: entropy of the two ends saying the same class,
      -sum_c P_c Q_c log(P_c Q_c).
    - `view_discrepancy`: symmetric KL between the two views of a sample, summed over both ends.

    The fourth rule, `edge_discrepancy`, is the loss of the edge itself and needs the teacher.
    """
    _check_views(edges, student_virtual)
    real = torch.log_softmax(_wide(student_real.detach()), dim=-1)
    virtual = student_virtual
    if virtual is not None:
        virtual = torch.log_softmax(_wide(virtual.detach()), dim=-1)
    if rule == "view_discrepancy":
        if virtual is None:
            raise ValueError("pruning 'view_discrepancy' compares two views, got one")
        gap = ((real.exp() - virtual.exp()) * (real - virtual)).sum(dim=-1)
        gap = torch.cat([gap, gap]) if edges == "full" else gap
        return gap[:, None] + gap
    log_p, log_q = _ends(real, virtual, edges)
    p, q = log_p.exp(), log_q.exp()
    if rule == "joint_entropy_indep":
        return -(p * log_p).sum(dim=-1)[:, None] - (q * log_q).sum(dim=-1)
    if rule == "joint_entropy_diag":
        return -((p * log_p) @ q.T + p @ (q * log_q).T)
    raise ValueError(f"pruning {rule!r} is not judged by the student's predictions alone")


@dataclass(frozen=True)
class _Graph:
    """The teacher's vertices, and how the student's edges are held against its edges.

    Attributes:
        left: Where edges start, (n, d).
        right: Where they end, (m, d); None if it is the same set, then no vertex has an edge to
            itself.
        partner: For each left vertex the right one that may lie very close to it, (n,), or None.
        distance: "cosine" or "huber".
        delta: Where Huber turns linear.
    """

    left: Tensor
    right: Tensor | None
    partner: Tensor | None
    distance: Distance
    delta: float

    def match(
        self, left: Tensor, right: Tensor | None, weights: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """Sum of the kept edges' weighted distances over their number."""
        n, m = len(left), len(left if right is None else right)
        count = n * m - (n if right is None else 0)
        if keep is not None:
            count = int(keep.sum())
        if count == 0:
            return left.sum() * 0.0
        share: Tensor | float = 1.0 / count
        if weights is not None:
            root = weights.to(_compute_dtype(left)).sqrt()
            share = root[:, None] * (root / count)
        if keep is not None:
            share = keep * share
        loss: Tensor = _Match.apply(left, right, self, share)
        return loss

    def discrepancies(self, left: Tensor, right: Tensor | None) -> Tensor:
        """1 - cos of every edge, (n, m)."""
        with torch.autocast(left.device.type, enabled=False):
            return _Cosines(left, right, self).distances()


Gradients = tuple[Tensor | None, Tensor | None]


class _Match(torch.autograd.Function):
    """A scalar loss over edges.

    Being a scalar, its gradient is finished in forward, and nothing of the size of the graph
    lives until backward.
    """

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor | None, graph: _Graph, share: Tensor | float
    ) -> Tensor:
        solve = _cosine if graph.distance == "cosine" else _huber
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


def _cosine(
    left: Tensor, right: Tensor | None, graph: _Graph, share: Tensor | float, differentiate: bool
) -> tuple[Tensor, Gradients]:
    """Sum of share * (1 - cos) over edges; its gradients by both ends."""
    edges = _Cosines(left, right, graph)
    value = edges.distances().mul_(share).sum()
    return value, edges.gradients(share) if differentiate else (None, None)


class _Cosines:
    """Cosines between the student's and the teacher's edges, from Gram matrices.

    With S and T the differences of student and teacher, a to b and d to e:
    |S|^2 = |a|^2 + |b|^2 - 2 a.b and S.T = a.d + b.e - a.e - d.b. Both cancel where the ends are
    close. On a CPU float64 absorbs that; on a GPU, where float64 can be 64 times slower, float32
    does all but the edges to partners (the same sample in its other view), which are taken from
    their differences here and in the gradient. TF32 (off by default in torch) would be too coarse.
    """

    def __init__(self, left: Tensor, right: Tensor | None, graph: _Graph) -> None:
        dtype = _compute_dtype(left)
        self.own = right is None
        self.partner = None if dtype == torch.float64 else graph.partner
        self.a, self.b, origin_s = _centred(left, right, dtype)
        self.d, self.e, origin_t = _centred(graph.left, graph.right, dtype)
        a, b, d, e = self.a, self.b, self.d, self.e
        inner = (a * d).sum(dim=1)[:, None] + (b * e).sum(dim=1)
        cross = a @ e.T
        inner -= cross
        inner -= cross.T if self.own else d @ b.T
        del cross
        pair_s, pair_t = self._pairs()
        if pair_s is not None and pair_t is not None:
            inner[self._rows(), self.partner] = (pair_s * pair_t).sum(dim=1)
        self.inverse_s = self._inverse_length(a, b, origin_s, pair_s)
        self.inverse_t = self._inverse_length(d, e, origin_t, pair_t)
        self.cos = inner.mul_(self.inverse_s).mul_(self.inverse_t)  # 0 where an edge is 0

    def distances(self) -> Tensor:
        """|e_S - e_T|^2 / 2, (n, m): 1 - cos, less a half for each edge that is zero."""
        lengths = (self.inverse_s > 0).to(self.cos.dtype).add_(self.inverse_t > 0)
        return lengths.mul_(0.5).sub_(self.cos)

    def gradients(self, share: Tensor | float) -> Gradients:
        """Of sum(share * distances) by the student's left and right vertices.

        Consumes the matrices.
        """
        a, b, d, e = self.a, self.b, self.d, self.e
        pull = self.inverse_t.mul_(self.inverse_s).mul_(share)
        push = self.cos.mul_(self.inverse_s).mul_(self.inverse_s).mul_(share)
        at_pairs: Tensor | None = None
        pair_s, pair_t = self._pairs()
        if pair_s is not None and pair_t is not None:
            rows = self._rows()
            at_pairs = push[rows, self.partner, None] * pair_s
            at_pairs -= pull[rows, self.partner, None] * pair_t
            push[rows, self.partner] = 0
            pull[rows, self.partner] = 0
        left = push.sum(dim=1)[:, None] * a - pull.sum(dim=1)[:, None] * d
        left.addmm_(pull, e).addmm_(push, b, alpha=-1)
        if at_pairs is not None:
            left += at_pairs
        if self.own:
            return left.mul_(2), None  # each edge comes twice, once from either end
        right = push.sum(dim=0)[:, None] * b - pull.sum(dim=0)[:, None] * e
        right.addmm_(pull.T, d).addmm_(push.T, a, alpha=-1)
        if at_pairs is not None and self.partner is not None:
            right.index_add_(0, self.partner, at_pairs, alpha=-1)
        return left, right

    def _rows(self) -> Tensor:
        return torch.arange(len(self.a), device=self.a.device)

    def _pairs(self) -> Gradients:
        if self.partner is None:
            return None, None
        return self.a - self.b[self.partner], self.d - self.e[self.partner]

    def _inverse_length(self, a: Tensor, b: Tensor, origin: Tensor, pairs: Tensor | None) -> Tensor:
        """1 / |edge|, (n, m), or 0 where the edge is zero."""
        ends = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
        square = torch.addmm(ends, a, b.T, alpha=-2)
        # In float32 rounding of the Gram matrix hides more than _SHORTEST does.
        shortest = max(_SHORTEST**2, 32 * torch.finfo(a.dtype).eps)
        short = square <= ends * shortest + origin * _SHORTEST**2
        if self.own:
            short.fill_diagonal_(True)
        inverse = square.clamp_(min=torch.finfo(a.dtype).tiny).rsqrt_().masked_fill_(short, 0)
        if pairs is not None:
            rows = self._rows()
            exact = pairs.square().sum(dim=1)
            visible = exact > _SHORTEST**2 * (ends[rows, self.partner] + origin)
            inverse[rows, self.partner] = torch.where(visible, exact.rsqrt(), 0)
        return inverse


def _huber(
    left: Tensor, right: Tensor | None, graph: _Graph, share: Tensor | float, differentiate: bool
) -> tuple[Tensor, Gradients]:
    """Sum of share * Huber(e_S - e_T) over edges; its gradients by both ends.

    Huber looks at single elements, so the edges are written out, some rows at a time; their
    differences do not cancel as Gram matrices do, and float32 stays float32.
    """
    dtype = _wide(left).dtype
    a, b, origin_s = _centred(left, right, dtype)
    d, e, origin_t = _centred(graph.left, graph.right, dtype)
    value = a.new_zeros(())
    grad_left, grad_right = torch.zeros_like(a), torch.zeros_like(b)
    step = max(1, _BLOCK // max(1, b.numel()))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        edge, inverse = _unit_edges(a[rows], b, origin_s)
        gap = edge - _unit_edges(d[rows], e, origin_t)[0]
        size = gap.abs()
        bent = (size - graph.delta).clamp_(min=0)
        part = share[rows] if isinstance(share, Tensor) else share
        # Beyond delta a line: half of x^2, less half the square of what is beyond.
        value += ((size.square_() - bent.square_()).sum(dim=-1).mul_(0.5) * part).sum()
        if differentiate:
            pull = gap.clamp_(-graph.delta, graph.delta)
            pull -= (pull * edge).sum(dim=-1, keepdim=True) * edge
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
    ends = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) + origin
    inverse = torch.where(square > _SHORTEST**2 * ends, square.rsqrt(), 0)
    return difference.mul_(inverse[..., None]), inverse


def _centred(
    left: Tensor, right: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Both ends less their common mean, which no edge sees, and the mean's squared length.

    A shift that all vertices share would drown the differences in rounding.
    """
    a = left.to(dtype)
    mean = a.mean(dim=0)
    if right is None:
        a = a - mean
        return a, a, mean.square().sum()
    b = right.to(dtype)
    mean = (mean + b.mean(dim=0)) / 2
    return a - mean, b - mean, mean.square().sum()


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.device.type == "cpu" else _wide(tensor).dtype


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_views(edges: Edges, *virtual: Tensor | None) -> None:
    if edges != "real" and any(view is None for view in virtual):
        raise ValueError(f"edges {edges!r} need a virtual view of student and teacher")


def _ends(real: Tensor, virtual: Tensor | None, edges: Edges) -> tuple[Tensor, Tensor]:
    """Vertices at which edges start and end."""
    if edges == "real" or virtual is None:
        return real, real
    if edges == "real_virtual":
        return real, virtual
    both = torch.cat([real, virtual])
    return both, both


def _partner(left: Tensor, edges: Edges) -> Tensor | None:
    """Index of each vertex's other view among the right vertices."""
    if edges == "real":
        return None
    own = torch.arange(len(left), device=left.device)
    return own if edges == "real_virtual" else own.roll(len(left) // 2)


def _smallest(scores: Tensor, rho: float, *, own: bool) -> Tensor:
    """Mask without the `rho` largest scores (and, in a graph on `own` vertices, its diagonal)."""
    total = scores.numel()
    if own:
        scores = (scores + scores.T) / 2  # one fate for both directions, whatever the rounding
        scores.fill_diagonal_(-torch.inf)
        total -= len(scores)
    ranked = scores.flatten().kthvalue(max(1, scores.numel() - int(rho * total))).values
    keep = scores <= ranked
    return keep.fill_diagonal_(False) if own else keep
