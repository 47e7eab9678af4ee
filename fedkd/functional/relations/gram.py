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

Small graphs cost as many calls as numbers, so student and teacher lie in one tensor, and several
pairs of them may lie side by side on axes in front.
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


class Coarse(Exception):
    """Among several pairs of graphs there is one that float32 does not hold."""


def cosines(vertices: Tensor, sources: int, view_pairs: bool) -> Cosines:
    """Edges of two graphs, in the cheapest precision that holds them.

    Args:
        vertices: The student's and the teacher's, (..., 2, N, d).
        sources: How many of them edges start from; edges end at the others, or, if there are no
            others, at the same ones, and then no vertex has an edge to itself.
        view_pairs: Whether the second half of the vertices are other views of the first, and may
            lie close to them.

    Raises:
        Coarse: there are several pairs, and one needs more digits than the others.
    """
    if vertices.dtype != torch.float64:
        on_cpu = vertices.device.type == "cpu"
        edges = Cosines(vertices, sources, _PRECISE if on_cpu else _NOISE)
        if on_cpu and edges.complete():
            return edges
        if on_cpu and vertices.ndim > 3:
            raise Coarse
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
        self.own = sources == vertices.shape[-2]
        self.vertices = vertices
        vertices, self.origin = centred(vertices)
        left = vertices[..., :sources, :]
        right = left if self.own else vertices[..., sources:, :]
        self.a, self.d = a, d = left.unbind(-3)
        self.b, self.e = b, e = right.unbind(-3)
        student, teacher = (a, d) if self.own else vertices.unbind(-3)
        dots = (student * teacher).sum(dim=-1)
        self.norm = norm = (vertices * vertices).sum(dim=-1)
        # Squared lengths are |a|^2 + |b|^2 - 2 a.b; what is below `least` at both ends is zero.
        least = torch.add(norm * shortest, self.origin[..., None], alpha=SHORTEST**2 / 2)
        least += CLOSEST
        rest = norm - least
        products = _addmm(dots[..., :sources, None], a, e.mT, alpha=-1)
        # The shortest edge's square is left out and put back: a threshold at 0 costs a tenth of
        # a mask.
        square = _addmm(rest[..., :sources, None], left, right.mT, alpha=-2, axes=3)
        if self.own:
            products = products + products.mT
            starts, ends = least[..., None], least[..., None, :]
            square += rest[..., None, :]
        else:
            products = _addmm(products, d, b.mT, alpha=-1).add_(dots[..., None, sources:])
            starts, ends = least[..., :sources, None], least[..., None, sources:]
            square += rest[..., None, sources:]
        torch.threshold_(square, 0, torch.inf).add_(starts).add_(ends)
        self.products = products
        self.inverse = square.rsqrt_()  # 0 where an edge is zero
        self.view_pairs: Tensor | None = None
        self.visible: int | None = None  # how many edges there are, if it was counted

    def complete(self) -> bool:
        """Whether no edge counts as zero."""
        found = _counts(self.inverse)
        count = self.inverse.shape[-3:].numel()
        self.visible = count - (2 * self.a.shape[-2] if self.own else 0)
        if bool((found == self.visible).all()):
            return True
        self.visible = int(found) if found.ndim == 0 else None
        return False

    def refine_view_pairs(self) -> None:
        """Take the edges between the first and the second half from differences."""
        # Not of the centred ones, which have been rounded.
        half = self.vertices.shape[-2] // 2
        self.offsets = (half, -half) if self.own else (0,)
        first, second = self.vertices[..., :half, :], self.vertices[..., half:, :]
        self.view_pairs = view_pairs = first - second
        square = (view_pairs * view_pairs).sum(dim=-1)
        reach = self.norm[..., :half] + self.norm[..., half:] + self.origin[..., None]
        inverse = square.rsqrt().masked_fill_(square <= SHORTEST**2 * reach + CLOSEST, 0)
        ours, theirs = view_pairs.unbind(-3)
        product = (ours * theirs).sum(dim=-1)
        for offset in self.offsets:
            self.inverse.diagonal(offset, dim1=-2, dim2=-1).copy_(inverse)
            self.products.diagonal(offset, dim1=-2, dim2=-1).copy_(product)

    def distances(self) -> Tensor:
        """|e_S - e_T|^2 / 2, (n, m): 1 - cos, less a half for each edge that is zero."""
        ours, theirs = self.inverse.unbind(-3)
        cos = self.products * ours * theirs
        return self.inverse.sign().sum(dim=-3).mul_(0.5).sub_(cos)

    def solve(self, share: Tensor | float, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Sum of share * distances, and its gradient by the student's vertices, (..., N, d).

        Consumes the matrices.

        Args:
            share: (n, m) or one number; of several pairs (..., n, m) or (..., 1, 1).
            differentiate: Whether the gradient is found.
        """
        visible: Tensor | float
        several = self.inverse.ndim > 3
        if isinstance(share, Tensor) and (share.shape[-2:].numel() > 1 if several else share.ndim):
            visible = _total(self.inverse.sign().mul_(share.unsqueeze(-3)), 3)
        else:
            one = share.flatten() if several and isinstance(share, Tensor) else share
            if self.visible is None:
                visible = _counts(self.inverse).to(self.inverse.dtype) * one
            else:
                visible = self.visible * one
        # By the student's edge S: pull = share / (|S| |T|) along T, push = share * cos / |S|^2
        # along S itself, which takes out what would only make it longer.
        inverse, theirs = self.inverse.unbind(-3)
        pull = (inverse * theirs).mul_(share)
        push = self.products.mul_(pull)
        value = visible / 2 - _total(push, 2)
        if not differentiate:
            return value, None
        push.mul_(inverse).mul_(inverse)
        at_pairs: Tensor | None = None
        if self.view_pairs is not None:
            first, second = self.view_pairs.unbind(-3)
            pushes, pulls = (z.diagonal(self.offsets[0], -2, -1)[..., None] for z in (push, pull))
            at_pairs = pushes * first
            at_pairs.addcmul_(pulls, second, value=-1)
            for offset in self.offsets:
                push.diagonal(offset, -2, -1).zero_()
                pull.diagonal(offset, -2, -1).zero_()
        a, b, d, e = self.a, self.b, self.d, self.e
        if self.own:
            # The diagonals are empty: they take what belongs to the vertex itself. Each edge comes
            # twice, once from either end.
            push.diagonal(0, -2, -1).sub_(push.sum(dim=-1))
            pull.diagonal(0, -2, -1).sub_(pull.sum(dim=-1))
            gradient = _addmm(_mm(pull, d), push, a, alpha=-2, beta=2)
        else:
            gradient = a.new_empty(*a.shape[:-2], a.shape[-2] + b.shape[-2], a.shape[-1])
            left, right = gradient[..., : a.shape[-2], :], gradient[..., a.shape[-2] :, :]
            left.copy_(_addmm(_mm(pull, e), push, b, alpha=-1))
            right.copy_(_addmm(_mm(pull.mT, d), push.mT, a, alpha=-1))
            left.addcmul_(push.sum(dim=-1)[..., None], a)
            left.addcmul_(pull.sum(dim=-1)[..., None], d, value=-1)
            right.addcmul_(push.sum(dim=-2)[..., None], b)
            right.addcmul_(pull.sum(dim=-2)[..., None], e, value=-1)
        if at_pairs is not None:
            half = at_pairs.shape[-2]
            gradient[..., :half, :].add_(at_pairs, alpha=len(self.offsets))
            gradient[..., half:, :].sub_(at_pairs, alpha=len(self.offsets))
        return value, gradient


def centred(vertices: Tensor) -> tuple[Tensor, Tensor]:
    """Vertices (..., 2, N, d) less their means, and the means' squared lengths, (..., 2).

    A shift that all vertices share is seen by no edge, but would drown the differences in
    rounding.
    """
    mean = vertices.mean(dim=-2, keepdim=True)
    return vertices - mean, (mean * mean).sum(dim=(-2, -1))


# The last digits of many matrix products at once, or of a sum by several threads, depend on how
# many there are, and those of a product on where in memory its matrices begin. A CPU computes
# those of each pair of graphs by themselves, as if it were alone.
_LINE = 64


def _addmm(
    given: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float = 1, axes: int = 2
) -> Tensor:
    """beta * given + alpha * a @ b for matrices, or (`axes` 3) for two of them.

    There may be one more axis in front.
    """
    multiply = torch.addmm if axes == 2 else torch.baddbmm
    if a.ndim == axes:
        return multiply(given, a, b, alpha=alpha, beta=beta)
    if a.device.type == "cpu":
        each = zip(given, a if axes == 3 else map(_aligned, a), b)
        return torch.stack([multiply(*z, alpha=alpha, beta=beta) for z in each])
    parts = (z.flatten(0, -3) for z in (given, a, b))
    return torch.baddbmm(*parts, alpha=alpha, beta=beta).unflatten(0, a.shape[:-2])


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, likewise."""
    if a.ndim == 2 or a.device.type != "cpu":
        return a @ b
    return torch.stack([_aligned(x) @ y for x, y in zip(a, b)])


def _aligned(matrix: Tensor) -> Tensor:
    """A square one as if it had been allocated alone; vertices lie as their pair does."""
    square = matrix.shape[-1] == matrix.shape[-2]
    if not square or matrix.data_ptr() % _LINE == 0:
        return matrix
    return matrix.clone()


def _total(values: Tensor, axes: int) -> Tensor:
    """The sum over the last axes, likewise."""
    if values.ndim == axes:
        return values.sum()
    if values.device.type == "cpu":
        return torch.stack([part.sum() for part in values])
    return values.flatten(-axes).sum(dim=-1)


def _counts(values: Tensor) -> Tensor:
    """How many numbers of the last three axes are not zero."""
    return values.count_nonzero(dim=(-3, -2, -1)) if values.ndim > 3 else values.count_nonzero()
