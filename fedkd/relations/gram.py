"""Cosines between the edges of two graphs, from Gram matrices of their vertices.

For two unit vectors half the squared distance is one minus their cosine, and the cosines of all
edges follow from products of vertices. So no edge is ever written out: memory is quadratic in the
number of vertices, where the literal tensor of edges is that times their length.

With S and T the differences of student and teacher, a to b and d to e:
|S|^2 = |a|^2 + |b|^2 - 2 a.b and S.T = a.d + b.e - a.e - d.b. Both cancel where the ends are
close. On a CPU float64 absorbs that; on a GPU, where float64 can be 64 times slower, float32 does
all but the edges to partners (the same sample in its other view), which are taken from their
differences here and in the gradient. TF32 (off by default in torch) would be too coarse.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Shorter edges, relative to their ends, are rounding and not relation: they count as zero.
SHORTEST = 1e-6

Pair = tuple[Tensor | None, Tensor | None]


class Cosines:
    """Products and lengths of the student's edges (left to right) and the teacher's.

    Args:
        student: Its left and right vertices, (n, d) and (m, d); None on the right stands for
            the left ones again.
        teacher: Its vertices, (n, d') and (m, d').
        partner: For each left vertex the right one that may lie very close to it, (n,), or None.
    """

    def __init__(
        self,
        student: tuple[Tensor, Tensor | None],
        teacher: tuple[Tensor, Tensor | None],
        partner: Tensor | None,
    ) -> None:
        dtype = compute_dtype(student[0])
        self.own = student[1] is None
        self.partner = None if dtype == torch.float64 else partner
        self.a, self.b, origin_s = centred(*student, dtype)
        self.d, self.e, origin_t = centred(*teacher, dtype)
        a, b, d, e = self.a, self.b, self.d, self.e
        self.products = torch.addmm((a * d).sum(dim=1)[:, None], a, e.T, alpha=-1)
        if self.own:
            self.products = self.products + self.products.T
        else:
            self.products.addmm_(d, b.T, alpha=-1).add_((b * e).sum(dim=1))
        pair_s, pair_t = self._pairs()
        if pair_s is not None and pair_t is not None:
            self.products[self._rows(), self.partner] = (pair_s * pair_t).sum(dim=1)
        self.inverse_s = self._inverse_lengths(a, b, origin_s, pair_s)
        self.inverse_t = self._inverse_lengths(d, e, origin_t, pair_t)

    def distances(self) -> Tensor:
        """|e_S - e_T|^2 / 2, (n, m): 1 - cos, less a half for each edge that is zero."""
        visible = self.inverse_s.sign().add_(self.inverse_t.sign())
        return visible.mul_(0.5).sub_(self.products * self.inverse_s * self.inverse_t)

    def solve(self, share: Tensor | float, differentiate: bool) -> tuple[Tensor, Pair]:
        """Sum of share * distances, and its gradients by the student's left and right vertices.

        Consumes the matrices. In a graph on its own vertices a matrix `share` is symmetric.
        """
        if isinstance(share, Tensor):
            visible = (self.inverse_s.sign().add_(self.inverse_t.sign()).mul_(share)).sum()
        else:
            visible = (self.inverse_s.count_nonzero() + self.inverse_t.count_nonzero()) * share
        pull = self.inverse_t.mul_(self.inverse_s).mul_(share)
        push = self.products.mul_(pull)
        value = visible / 2 - push.sum()
        if not differentiate:
            return value, (None, None)
        push.mul_(self.inverse_s).mul_(self.inverse_s)
        a, b, d, e = self.a, self.b, self.d, self.e
        at_pairs: Tensor | None = None
        pair_s, pair_t = self._pairs()
        if pair_s is not None and pair_t is not None:
            rows = self._rows()
            at_pairs = push[rows, self.partner, None] * pair_s
            at_pairs -= pull[rows, self.partner, None] * pair_t
            push[rows, self.partner] = 0
            pull[rows, self.partner] = 0
        if self.own:
            # The diagonals are empty: they take what belongs to the vertex itself.
            push.diagonal().sub_(push.sum(dim=1))
            pull.diagonal().sub_(pull.sum(dim=1))
            # Each edge comes twice, once from either end.
            left = torch.addmm(pull @ d, push, a, alpha=-2, beta=2)
            return value, (left if at_pairs is None else left.add_(at_pairs, alpha=2), None)
        left, right = pull @ e, pull.T @ d
        left.addmm_(push, b, alpha=-1)
        right.addmm_(push.T, a, alpha=-1)
        left.addcmul_(push.sum(dim=1)[:, None], a).addcmul_(pull.sum(dim=1)[:, None], d, value=-1)
        right.addcmul_(push.sum(dim=0)[:, None], b).addcmul_(pull.sum(dim=0)[:, None], e, value=-1)
        if at_pairs is not None and self.partner is not None:
            left += at_pairs
            right.index_add_(0, self.partner, at_pairs, alpha=-1)
        return value, (left, right)

    def _rows(self) -> Tensor:
        return torch.arange(len(self.a), device=self.a.device)

    def _pairs(self) -> Pair:
        if self.partner is None:
            return None, None
        return self.a - self.b[self.partner], self.d - self.e[self.partner]

    def _inverse_lengths(
        self, a: Tensor, b: Tensor, origin: Tensor, pairs: Tensor | None
    ) -> Tensor:
        """1 / |edge|, (n, m), or 0 where the edge is zero."""
        square = squares(a, None if self.own else b, origin)
        if pairs is not None:
            rows = self._rows()
            exact = pairs.square().sum(dim=1)
            reach = a.square().sum(dim=1) + b.square().sum(dim=1)[self.partner] + origin
            square[rows, self.partner] = exact.masked_fill(exact <= SHORTEST**2 * reach, torch.inf)
        return square.rsqrt_()


def squares(a: Tensor, b: Tensor | None, origin: Tensor) -> Tensor:
    """Squared lengths of all edges between two sets of vertices, (n, m); inf where there is none.

    Args:
        a: Centred vertices at which edges start, (n, d).
        b: Where they end, (m, d); None if it is the same set.
        origin: Squared length of what centring took away.
    """
    # In float32 rounding of the Gram matrix hides more than SHORTEST does.
    shortest = max(SHORTEST**2, 32 * torch.finfo(a.dtype).eps)
    norm_a = a.square().sum(dim=1)
    norm_b = norm_a if b is None else b.square().sum(dim=1)
    least_a = norm_a * shortest + origin * (SHORTEST**2 / 2)
    least_b = least_a if b is None else norm_b * shortest + origin * (SHORTEST**2 / 2)
    # What the shortest edge would have is left out and put back: a threshold at 0 costs a tenth
    # of a mask.
    square = torch.addmm((norm_a - least_a)[:, None], a, (a if b is None else b).T, alpha=-2)
    torch.threshold_(square.add_(norm_b - least_b), 0, torch.inf)
    return square.add_(least_a[:, None]).add_(least_b)


def centred(
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


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 on a CPU; elsewhere the tensor's own, at least float32."""
    return torch.float64 if tensor.device.type == "cpu" else wide(tensor).dtype


def wide(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
