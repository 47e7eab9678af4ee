"""Cosines between the edges of two graphs, from Gram matrices of their vertices.

For two unit vectors half the squared distance is one minus their cosine, and the cosines of all
edges follow from products of vertices. So no edge is ever written out: memory is quadratic in the
number of vertices, where the literal tensor of edges is that times their length.

With S and T the differences of student and teacher, a to b and d to e:
|S|^2 = |a|^2 + |b|^2 - 2 a.b and S.T = a.d + b.e - a.e - d.b. Both cancel where the ends are
close. The edges that expect it (from a sample to its own other view) are taken from differences,
here and in the gradient. For all others float32 does if they are not short; if one is, a CPU
takes float64 instead, where a GPU, which can be 64 times slower at that, goes without the very
shortest. TF32 (off by default in torch) would be too coarse.

Small graphs cost as many calls as numbers, so student and teacher lie in one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.functional.relations.general import CLOSEST

# Shorter edges, relative to their ends, are rounding and not relation: they count as zero.
SHORTEST = 1e-6
# Squared lengths, relative to the ends', that float32 Gram matrices hold to five digits, and those
# that rounding may have made.
_PRECISE = 1e-2
_NOISE = 32 * torch.finfo(torch.float32).eps


def cosines(vertices: Tensor, sources: int, view_pairs: bool) -> Cosines:
    """Edges of two graphs, in the cheapest precision that holds them.

    Args:
        vertices: The student's and the teacher's, (2, N, d).
        sources: How many of them edges start from; edges end at the others, or, if there are no
            others, at the same ones, and then no vertex has an edge to itself.
        view_pairs: Whether the second half of the vertices are other views of the first, and may
            lie close to them.
    """
    if vertices.dtype != torch.float64:
        on_cpu = vertices.device.type == "cpu"
        edges = Cosines(vertices, sources, _PRECISE if on_cpu else _NOISE)
        if on_cpu and edges.complete():
            return edges
        if view_pairs:
            edges.refine_view_pairs()
        if not on_cpu or (view_pairs and edges.complete()):
            return edges
    return Cosines(vertices.double(), sources, SHORTEST**2)


class Cosines:
    """Products and inverse lengths of the student's edges and the teacher's.

    Edges of less squared length than `shortest`, relative to their ends, count as zero. What is
    computed is, for the student's vertices a and b at the two ends and the teacher's d and e,

        S, T = a[:, None] - b, d[:, None] - e
        products = (S * T).sum(-1)
        inverse = 1 / S.norm(dim=-1), 1 / T.norm(dim=-1)      # 0 for an edge of no length
        distances = 1 - products * inverse[0] * inverse[1]
        value = (share * distances).sum()

    and the gradient of the value by a and b, without ever holding S and T.
    """

    def __init__(self, vertices: Tensor, sources: int, shortest: float) -> None:
        self.own = sources == vertices.shape[1]
        self.vertices = vertices
        vertices, self.origin = centred(vertices)
        left = vertices[:, :sources]
        right = left if self.own else vertices[:, sources:]
        self.a, self.d = a, d = left.unbind()
        self.b, self.e = b, e = right.unbind()
        dots = (a * d).sum(dim=1) if self.own else (vertices[0] * vertices[1]).sum(dim=1)
        self.norm = norm = (vertices * vertices).sum(dim=2)
        # Squared lengths are |a|^2 + |b|^2 - 2 a.b; what is below `least` at both ends is zero.
        least = torch.add(norm * shortest, self.origin[:, None], alpha=SHORTEST**2 / 2)
        least += CLOSEST
        rest = norm - least
        products = torch.addmm(dots[:sources, None], a, e.T, alpha=-1)
        # The shortest edge's square is left out and put back: a threshold at 0 costs a tenth of
        # a mask.
        square = torch.baddbmm(rest[:, :sources, None], left, right.mT, alpha=-2)
        if self.own:
            products = products + products.T
            starts, ends = least[:, :, None], least[:, None]
            square += rest[:, None]
        else:
            products.addmm_(d, b.T, alpha=-1).add_(dots[sources:])
            starts, ends = least[:, :sources, None], least[:, None, sources:]
            square += rest[:, None, sources:]
        torch.threshold_(square, 0, torch.inf).add_(starts).add_(ends)
        self.products = products
        self.inverse = square.rsqrt_()  # 0 where an edge is zero
        self.view_pairs: Tensor | None = None
        self.visible: int | None = None  # how many edges there are, if it was counted

    def complete(self) -> bool:
        """Whether no edge counts as zero."""
        self.visible = int(self.inverse.count_nonzero())
        return self.visible == self.inverse.numel() - (2 * len(self.a) if self.own else 0)

    def refine_view_pairs(self) -> None:
        """Take the edges between the first and the second half from differences."""
        # Not of the centred ones, which have been rounded.
        half = self.vertices.shape[1] // 2
        self.offsets = (half, -half) if self.own else (0,)
        self.view_pairs = view_pairs = self.vertices[:, :half] - self.vertices[:, half:]
        square = (view_pairs * view_pairs).sum(dim=2)
        reach = self.norm[:, :half] + self.norm[:, half:] + self.origin[:, None]
        inverse = square.rsqrt().masked_fill_(square <= SHORTEST**2 * reach + CLOSEST, 0)
        product = (view_pairs[0] * view_pairs[1]).sum(dim=1)
        for offset in self.offsets:
            self.inverse.diagonal(offset, dim1=1, dim2=2).copy_(inverse)
            self.products.diagonal(offset).copy_(product)

    def distances(self) -> Tensor:
        """|e_S - e_T|^2 / 2, (n, m): 1 - cos, less a half for each edge that is zero."""
        cos = self.products * self.inverse[0] * self.inverse[1]
        return self.inverse.sign().sum(dim=0).mul_(0.5).sub_(cos)

    def solve(self, share: Tensor | float, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Sum of share * distances, and its gradient by the student's vertices, (N, d).

        Consumes the matrices.
        """
        visible: Tensor | float
        if isinstance(share, Tensor) and share.ndim:
            visible = self.inverse.sign().mul_(share).sum()
        elif self.visible is None:
            visible = self.inverse.count_nonzero().to(self.inverse.dtype) * share
        else:
            visible = self.visible * share
        # By the student's edge S: pull = share / (|S| |T|) along T, push = share * cos / |S|^2
        # along S itself, which takes out what would only make it longer.
        inverse = self.inverse[0]
        pull = (inverse * self.inverse[1]).mul_(share)
        push = self.products.mul_(pull)
        value = visible / 2 - push.sum()
        if not differentiate:
            return value, None
        push.mul_(inverse).mul_(inverse)
        at_pairs: Tensor | None = None
        if self.view_pairs is not None:
            pushes, pulls = push.diagonal(self.offsets[0]), pull.diagonal(self.offsets[0])
            at_pairs = pushes[:, None] * self.view_pairs[0]
            at_pairs.addcmul_(pulls[:, None], self.view_pairs[1], value=-1)
            for offset in self.offsets:
                push.diagonal(offset).zero_()
                pull.diagonal(offset).zero_()
        a, b, d, e = self.a, self.b, self.d, self.e
        if self.own:
            # The diagonals are empty: they take what belongs to the vertex itself. Each edge comes
            # twice, once from either end.
            push.diagonal().sub_(push.sum(dim=1))
            pull.diagonal().sub_(pull.sum(dim=1))
            gradient = torch.addmm(pull @ d, push, a, alpha=-2, beta=2)
        else:
            gradient = torch.empty(len(a) + len(b), a.shape[1], dtype=a.dtype, device=a.device)
            left, right = gradient[: len(a)], gradient[len(a) :]
            torch.mm(pull, e, out=left).addmm_(push, b, alpha=-1)
            torch.mm(pull.T, d, out=right).addmm_(push.T, a, alpha=-1)
            left.addcmul_(push.sum(dim=1)[:, None], a)
            left.addcmul_(pull.sum(dim=1)[:, None], d, value=-1)
            right.addcmul_(push.sum(dim=0)[:, None], b)
            right.addcmul_(pull.sum(dim=0)[:, None], e, value=-1)
        if at_pairs is not None:
            half = len(at_pairs)
            gradient[:half].add_(at_pairs, alpha=len(self.offsets))
            gradient[half:].sub_(at_pairs, alpha=len(self.offsets))
        return value, gradient


def centred(vertices: Tensor) -> tuple[Tensor, Tensor]:
    """Vertices (2, N, d) less their means, and the means' squared lengths, (2,).

    A shift that all vertices share is seen by no edge, but would drown the differences in
    rounding.
    """
    mean = vertices.mean(dim=1, keepdim=True)
    return vertices - mean, (mean * mean).sum(dim=(1, 2))
