"""The shortest vector between some vectors, from their inner products alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Steps of an interior point: each leaves about a tenth of what was missing.
_STEPS = 25

Array = NDArray[np.float64]


def shortest(gram: Array, bound: float = 1.0) -> Array:
    """Weights w of the shortest sum of w_k g_k with sum of w = 1 and 0 <= w_k <= bound, (K,).

    Minimises w' G w. Of many solutions it takes about the most even one.

    Args:
        gram: Inner products of the vectors, (K, K), computed in double precision.
        bound: Largest weight; below 1 / K the weights are all 1 / K.
    """
    # Here and not above: with the optimisers `import fedkd` takes longer.
    from scipy.optimize import lsq_linear, nnls  # type: ignore[import-untyped]

    count = len(gram)
    even = np.full(count, 1 / count)
    size = gram.diagonal().max()
    if count == 1 or not 0 < size < np.inf or bound * count <= 1 + 1e-9:
        return even
    squares, axes = np.linalg.eigh(gram / size)
    # A little in every direction leaves one solution where there are many.
    root = np.sqrt(squares.clip(min=0) + 1e-13)[:, None] * axes.T
    # |root w|^2 + (sum of w - 1)^2 is least at a multiple of the weights: with no upper bound,
    # only the length of w has to be put right.
    rows, target = np.vstack([root, np.ones(count)]), np.append(np.zeros(count), 1.0)
    weights: Array = nnls(rows, target, maxiter=30 * count)[0]
    weights /= weights.sum()
    if weights.max() <= bound:
        return weights
    # With one, the sum is raised until it is 1 (augmented Lagrangian).
    for _ in range(60):
        weights = lsq_linear(rows, target, (0, bound), method="bvls").x.clip(0, bound)
        missing = 1 - weights.sum()
        if abs(missing) < 1e-13:
            break
        target[-1] += missing
    return weights / weights.sum()


def shortest_there(gram: Tensor, present: Tensor, nu: float | None = None) -> Tensor:
    """As `shortest` to six digits, on the device: an interior point's steps, whose number is fixed.

    Args:
        gram: (K, K), in double precision.
        present: Which vectors count, (K,); the others get no weight.
        nu: No weight exceeds 1 / (nu * K), for the K that count; None sets no limit.
    """
    here = present.to(gram.dtype)
    count = here.sum().clamp(min=1)
    even = here / count
    size = (gram.diagonal() * here).max()
    sound = (size > 0) & size.isfinite()
    # An absent vector is so long that it gets next to nothing.
    squares = torch.where(sound, gram * here * here[:, None] / torch.where(sound, size, 1), 0)
    squares = squares + torch.diag(1e-12 + 1e8 * (1 - here))
    bound = torch.ones_like(count) if nu is None else 1 / torch.clamp(nu * count, min=1)
    tight = bound * count <= 1 + 1e-9
    bound = torch.where(tight, 2.0, bound)
    w, z, v = torch.full_like(here, 1 / len(here)), torch.ones_like(here), torch.ones_like(here)
    # Within the bounds from the start, also where most are absent.
    bound = torch.where(present, bound, 2.0)
    w = w.minimum(0.5 * bound)
    level = torch.zeros_like(count)
    for _ in range(_STEPS):
        slack = bound - w
        gap = ((w * z).mean() + (slack * v).mean()) / 2
        target = (0.1 * gap).clamp(min=1e-15)  # beyond it the system has no digits left
        matrix = squares + torch.diag(z / w + v / slack)
        rest = level - squares @ w + target / w - target / slack
        sides = torch.stack([rest, torch.ones_like(rest)], dim=1)
        first, ones = torch.linalg.solve_ex(matrix, sides)[0].unbind(dim=1)
        up = (1 - w.sum() - first.sum()) / ones.sum()
        dw = first + up * ones
        dz = target / w - z - z / w * dw
        dv = target / slack - v + v / slack * dw
        falls = torch.cat([-dw / w, dw / slack, -dz / z, -dv / v])
        stride = (0.99 / falls.max().clamp(min=0.99)).clamp(max=1)
        w, z, v = w + stride * dw, z + stride * dz, v + stride * dv
        level = level + stride * up
    found = (w * here).clamp(min=0)
    found = found / found.sum()
    return torch.where(tight | ~sound | (count == 1), even, found)


def one_class(gram: Array, nu: float, *, tolerance: float = 1e-6) -> Array:
    """As `shortest`, but as the dual of a one-class support vector machine, as published.

    It ends when no two weights would gain more than `tolerance`. That is a length and not a share:
    vectors shorter than its root are left where they began.

    Args:
        gram: Inner products of the vectors, (K, K).
        nu: Share of the vectors that must have a weight: none exceeds 1 / (nu * K).
        tolerance: See above.
    """
    from sklearn.svm import OneClassSVM

    machine = OneClassSVM(kernel="precomputed", nu=nu, tol=tolerance).fit(gram)
    weights = np.zeros(len(gram))
    weights[machine.support_] = machine.dual_coef_[0]
    result: Array = weights / weights.sum()
    return result
