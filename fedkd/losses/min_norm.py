"""The shortest vector between some vectors, from their inner products alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
