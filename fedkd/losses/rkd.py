"""Relational knowledge distillation: distances between samples, and angles at them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.analytic_grad import with_gradient
from fedkd.functional.options import Positive
from fedkd.functional.relations.general import cosines, squares
from fedkd.knowledge.kinds import Kind, Logits, Pooled
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.losses.kd import comparable

Space = Literal["features", "logits"]

# Elements of the (B, B, B) angles that are held at once, which stay in cache.
_BLOCK = 2**16
# Squared distances, relative to the largest, that float32 holds to five digits.
_PRECISE = 1e-2


@loss_function("rkd")
def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor | None = None,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    eps: Positive = 1e-12,
) -> Tensor:
    """distance_weight * L_distance + angle_weight * L_angle, a scalar.

    Both are smooth L1 losses (linear beyond 1): over all pairs of samples, of their distance in
    units of the mean distance; over all triples, of the cosine of the angle between the edges
    from the first to the others. Means run over all B^2 pairs and B^3 triples, though a sample's
    distance to itself is 0.

    Args:
        student: Vectors, (B, ...), flattened here; half precision is computed in float32.
        teacher: (B, ...), detached; sizes beyond B may differ.
        weights: This teacher's weight on each sample, (B,); ones if None. A pair or triple
            counts the geometric mean of its samples' weights, in the mean distance as well.
        distance_weight: Weight of the distances. The paper's ratio is 1 to 2.
        angle_weight: Weight of the angles, over all triples of a batch: their number grows
            with its third power, so set it to 0 for very large batches.
        squared: Compare squared distances.
        eps: Smallest squared distance.
    """
    check_batch("rkd", student, teacher, weights=weights)
    student, teacher = comparable(student.flatten(1), teacher.flatten(1))
    options = weights, distance_weight, angle_weight, squared, eps
    return with_gradient(
        student,
        lambda x, differentiate: _solve(x, teacher, *options, differentiate=differentiate),
        lambda x: _formula(x, teacher, *options),
    )


def _solve(
    x: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    distance_weight: float,
    angle_weight: float,
    squared: bool,
    eps: float,
    *,
    differentiate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Value and gradient by the student's vectors x, (B, D)."""
    dtype = x.dtype
    # All that is cheap beside the angles is precise beside them.
    of_student, of_teacher, x = _squares(x, teacher, precise=angle_weight != 0)
    w = None if weights is None else weights.detach().to(x.dtype)
    value, slope = x.new_zeros(()), torch.zeros_like(of_student)
    if distance_weight:
        value += distance_weight * _distances(
            of_student, of_teacher, w, slope, squared, eps, distance_weight
        )
    if angle_weight:
        if (
            dtype == torch.float32
            and x.device.type == "cpu"
            and _spread(of_student)
            and _spread(of_teacher)
        ):
            of_student, of_teacher = of_student.float(), of_teacher.float()
        value += angle_weight * _angles(of_student, of_teacher, w, slope, angle_weight)
    if not differentiate:
        return value.to(dtype), None
    # From squared distances to their ends.
    slope = slope + slope.T
    gradient = torch.addmm(slope.sum(dim=1, keepdim=True) * x, slope, x, beta=2, alpha=-2)
    return value.to(dtype), gradient.to(dtype)


def _formula(
    x: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    distance_weight: float,
    angle_weight: float,
    squared: bool,
    eps: float,
) -> Tensor:
    """The value over all pairs and triples at once, for autograd."""
    dtype, wide = x.dtype, x.dtype if x.device.type == "mps" else torch.float64
    both = [squares(z, z) for z in (x.to(wide), teacher.to(wide))]
    w = both[0].new_ones(len(x)) if weights is None else weights.detach().to(wide)
    value = x.new_zeros((), dtype=wide)
    if distance_weight:
        share = torch.outer(w, w).sqrt() * (1 - torch.eye(len(x), dtype=wide, device=x.device))
        total = share.sum()
        found = []
        for square in both:
            length = square.clamp(min=eps)
            length = length if squared else length.sqrt()
            found.append(length * torch.where(total == 0, 0, total / (share * length).sum()))
        ours, theirs = found
        gaps = F.smooth_l1_loss(ours, theirs, reduction="none")
        value = value + distance_weight * (share * gaps).mean()
    if angle_weight:
        root = w.pow(1 / 3)
        ours, theirs = (cosines(square) for square in both)
        gaps = F.smooth_l1_loss(ours, theirs, reduction="none")
        gaps = gaps * root[:, None, None] * torch.outer(root, root)
        value = value + angle_weight * gaps.mean()
    return value.to(dtype)


@LOSSES.register("rkd")
class RKDLoss(FormulaLoss, formula=rkd_loss):
    """Matches distances between samples and angles at them.

    Args:
        space: What samples are placed by: "features" (the pooled vector) or "logits".
        formula: Options of `rkd_loss`.

    References:
        Park et al., "Relational Knowledge Distillation", CVPR 2019,
            https://arxiv.org/abs/1904.05068
    """

    needs: tuple[Kind, ...] = (Pooled(),)

    def __init__(self, *, space: Space = "features", **formula: Any) -> None:
        super().__init__(**formula)
        self.needs = (Pooled(),) if space == "features" else (Logits(),)


def _squares(x: Tensor, y: Tensor, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of both, (B, B), and `x` in their dtype, float64 where it is needed."""
    # Whether float32 does is only known when it is done, which an accelerator shall not tell; mps
    # has no float64.
    device = x.device.type
    if device == "mps" or (device == "cpu" and not precise):
        of_x, of_y = squares(x, x), squares(y, y)
        if device == "mps" or (_spread(of_x) and _spread(of_y)):
            return of_x, of_y, x
    x, y = x.double(), y.double()
    return squares(x, x), squares(y, y), x


def _spread(squares: Tensor) -> bool:
    """Whether no two samples lie too close for float32."""
    return int((squares <= _PRECISE * squares.max()).sum()) == len(squares)


def _distances(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    slope: Tensor,
    squared: bool,
    eps: float,
    factor: float,
) -> Tensor:
    """L_distance; adds `factor` times its gradient by the student's squares to `slope`."""
    size = len(student)
    share = torch.ones_like(student) if weights is None else torch.outer(weights, weights).sqrt()
    share.fill_diagonal_(0)
    total = share.sum()
    none = total == 0  # without weights all shares, and so value and slope, are 0
    total = torch.where(none, 1, total)

    def scaled(squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lengths = squares.clamp(min=eps)
        lengths = lengths if squared else lengths.sqrt_()
        mean = torch.where(none, 1, (share * lengths).sum() / total)
        return lengths, mean, (lengths / mean).fill_diagonal_(0)

    lengths, mean, ours = scaled(student)
    gap = ours - scaled(teacher)[2]
    pull = gap.clamp(-1, 1)
    value = (share * pull * gap.sub_(pull, alpha=0.5)).sum() / size**2
    # The mean moves with every length.
    pull = share * (pull - (share * pull * ours).sum() / total)
    pull *= (student >= eps) * (factor / (size**2 * mean))
    slope += pull if squared else pull.div_(lengths).mul_(0.5)
    return value


def _angles(
    student: Tensor, teacher: Tensor, weights: Tensor | None, slope: Tensor, factor: float
) -> Tensor:
    """L_angle; adds `factor` times its gradient by the student's squares to `slope`.

    By the law of cosines the cosine at i between j and k is
    (q_ij + q_ik - q_jk) / (2 l_ij l_ik), for squares q and lengths l. So edges are not written
    out, and triples only a few i at a time.
    """
    size = len(student)
    ours, theirs = _lengths(student), _lengths(teacher)
    value = student.new_zeros(())
    root = None if weights is None else weights.to(student.dtype).pow(1 / 3)
    opposite = torch.zeros_like(student)
    step = max(1, _BLOCK // size**2)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        cos = _cosines(student, *ours, rows)
        gap = cos - _cosines(teacher, *theirs, rows)
        pull = gap.clamp(-1, 1)
        gap.sub_(pull, alpha=0.5)
        if root is not None:
            pull *= root[rows, None, None] * torch.outer(root, root)
        value += torch.dot(pull.flatten(), gap.flatten())
        inverse = ours[1][rows]
        slope[rows] -= cos.mul_(pull).sum(dim=2) * inverse.square() * (factor / size**3)
        pull.mul_(inverse[:, :, None]).mul_(inverse[:, None, :])
        slope[rows] += pull.sum(dim=2) * (factor / size**3)
        opposite += pull.sum(dim=0)
    slope.sub_(opposite, alpha=0.5 * factor / size**3)
    return value / size**3


def _cosines(squares: Tensor, lengths: Tensor, inverse: Tensor, rows: slice) -> Tensor:
    """Cosines at the vertices `rows` between all pairs of edges, (n, B, B); 0 for a zero edge."""
    cos = squares[rows, :, None] - squares
    torch.addcmul(lengths[rows, None], cos, inverse[rows, None], out=cos)
    return cos.mul_(inverse[rows, :, None] / 2)


def _lengths(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of edges and their inverses; both are 0 for a zero edge."""
    inverse = squares.masked_fill(squares == 0, torch.inf).rsqrt_()
    return squares * inverse, inverse
