"""Relations between vectors, and how far two relations are apart, formula by formula.

The general form of relation-based distillation is a sum of d(psi(v_i, v_j), psi(t_i, t_j)). Here
are the psi and the d, differentiated by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Psi = Literal["identity", "distance", "squared_distance", "gram", "direction", "angle"]
Discrepancy = Literal["smooth_l1", "huber", "squared", "cosine", "pearson"]
Normalisation = Literal["none", "mean", "rows"]

VECTORS = ("identity", "direction")
LENGTHS = ("distance", "squared_distance")

# Squared distances up to this are none: the gradient of a direction or an angle grows with the
# inverse distance, and would soon leave float32.
CLOSEST = 1e-30


@dataclass(frozen=True)
class Relations:
    """psi: which relations there are between vertices.

    Attributes:
        relation: What it is; see `relation_loss`.
        normalisation: What relations are divided by.
        sources: How many vertices edges start from, to end at the others; 0 joins all pairs.
        eps: Smallest squared distance.
    """

    relation: Psi
    normalisation: Normalisation
    sources: int
    eps: float

    def share(self, weights: Tensor) -> Tensor:
        """How much each relation counts: the geometric mean of its vertices' weights."""
        if self.relation == "identity":
            return weights
        if self.relation == "angle":
            root = weights.pow(1 / 3)
            return root[:, None, None] * torch.outer(root, root)
        left, right = self._ends(weights)
        return torch.outer(left, right).sqrt()

    def between(self, points: Tensor, share: Tensor) -> Tensor:
        """Relations (N, D), (n, m), (n, m, D) or (N, N, N)."""
        if self.relation == "identity":
            return points
        left, right = self._ends(points)
        if self.relation == "direction":
            directions = _unit(left[:, None] - right)
            return torch.where((squares(left, right) == 0)[..., None], 0, directions)
        if self.relation == "gram":
            found = left @ right.T
        elif self.relation == "angle":
            return cosines(squares(points, points))
        else:
            found = squares(left, right).clamp(min=self.eps)
            found = found if self.relation == "squared_distance" else found.sqrt()
            found = found * self._different(found)
        if self.normalisation == "mean":
            share = share * self._different(found)
            total = share.sum()
            # Without weights the quotient is 0/0: its gradient is NaN even where it is not used.
            length = torch.where(total == 0, 1, (share * found).sum())
            return found * (total / length)
        if self.normalisation == "rows":
            total = share.mean(dim=1, keepdim=True)
            metric = torch.where(total == 0, 1, share / total)
            length = (metric * found * found).sum(dim=1, keepdim=True)
            return found * length.clamp(min=1e-24).rsqrt()
        return found

    def _ends(self, of: Tensor) -> tuple[Tensor, Tensor]:
        return (of[: self.sources], of[self.sources :]) if self.sources else (of, of)

    def _different(self, found: Tensor) -> Tensor:
        """1 for two vertices, 0 for a vertex and itself."""
        ones = torch.ones_like(found)
        return ones if self.sources else ones.fill_diagonal_(0)


def differences(
    student: Tensor, teacher: Tensor, distance: Discrepancy, delta: float, constant: Tensor
) -> Tensor:
    """d: of each element, or, by cosine or correlation, of each vector."""
    if distance in ("cosine", "pearson"):
        least = 0.0
        if distance == "pearson":
            along = constant / constant.square().sum()
            student, teacher = (z - (z @ along)[..., None] * constant for z in (student, teacher))
            least = 1e-8
        # 1 - cos, but 0 where both are zero.
        return (_unit(student, least) - _unit(teacher, least)).square().sum(dim=-1) / 2
    gap = student - teacher
    if distance == "squared":
        return gap.square()
    bent = gap.clamp(-delta, delta)
    huber = bent * (gap - bent / 2)
    return huber if distance == "huber" else huber / delta


def _unit(vectors: Tensor, least: float = 0.0) -> Tensor:
    """Vectors of length one; 0, without gradient, for those not longer than `least`."""
    square = vectors.square().sum(dim=-1, keepdim=True)
    short = square <= least**2  # false of NaN, which must not look like a vector of zeros
    return torch.where(short, 0, vectors * torch.where(short, 1, square).rsqrt())


def squares(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances, (n, d) x (m, d) -> (n, m); 0 where rounding may have made them."""
    middle = left.mean(dim=0) if left is right else (left.mean(dim=0) + right.mean(dim=0)) / 2
    left, right = left - middle, right - middle
    reach = left.square().sum(dim=1)[:, None] + right.square().sum(dim=1)
    square = torch.addmm(reach, left, right.T, alpha=-2)
    least = 1e-12 if square.dtype == torch.float64 else 32 * torch.finfo(square.dtype).eps
    # NaN is not less, and stays.
    return torch.where(square <= (least * reach).clamp_(min=CLOSEST), 0, square)


def cosines(square: Tensor) -> Tensor:
    """Cosine at i between j and k, (N, N, N), by the law of cosines; 0 for a zero edge."""
    none = square == 0
    inverse = torch.where(none, 0, torch.where(none, 1, square).rsqrt())
    sides = square[:, :, None] + square[:, None, :] - square
    return sides * inverse[:, :, None] * inverse[:, None, :] / 2
