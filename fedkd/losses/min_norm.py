"""The shortest vector between some vectors, from their inner products alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Vectors for which it pays to guess first.
FEW = 16


def shortest(gram: Array, bound: float = 1.0) -> Array:
    """Weights w of the shortest sum of w_k g_k with sum of w = 1 and 0 <= w_k <= bound, (K,).

    Minimises w' G w: for few vectors by a guess that is checked, else by a primal-dual interior
    point method, some ten Newton steps on K numbers, whatever the length of the vectors. Of many
    solutions it takes one in their middle, so the order of the vectors does not matter even where
    they are more than dimensions.

    Args:
        gram: Inner products of the vectors, (K, K), computed in double precision.
        bound: Largest weight; below 1 / K the weights are all 1 / K.

    References:
        Mehrotra, "On the Implementation of a Primal-Dual Interior Point Method", SIAM J. Optim.
            1992, https://doi.org/10.1137/0802028
    """
    count = len(gram)
    even = np.full(count, 1 / count)
    size = gram.diagonal().max()
    if count == 1 or not 0 < size < np.inf or bound * count <= 1 + 1e-9:
        return even
    # A little on the diagonal: rounding must not make it look as if squares were negative.
    gram = gram / size + np.diag(np.full(count, 1e-13))
    guess = _by_dropping(gram) if count <= FEW else None
    if guess is not None and guess.max() <= bound:
        return guess
    # What is left of each bound (the weight itself, and up to the largest), and its multiplier.
    slack, signs = even[None], np.ones((1, 1))
    if bound < 1:
        slack, signs = np.stack([even, bound - even]), np.array([[1.0], [-1.0]])
    dual = np.ones_like(slack)
    price = 0.0
    for _ in range(50):
        product = slack * dual
        gap = product.mean()
        residual = _times(gram, slack[0]) - price - (signs * dual).sum(axis=0)
        if gap < 1e-15 and np.abs(residual).max() < 1e-12:
            break
        inverse = _inverse(gram, (dual / slack).sum(axis=0))
        # First where Newton would go without regard to the bounds, then there with a correction.
        ds, dz, _price = _step(inverse, signs, slack, dual, residual, -product)
        after = ((slack + _reach(slack, ds) * ds) * (dual + _reach(dual, dz) * dz)).mean()
        centre = gap * (after / gap) ** 3
        ds, dz, dp = _step(inverse, signs, slack, dual, residual, centre - product - ds * dz)
        length = 0.995 * min(_reach(slack, ds), _reach(dual, dz))
        slack, dual, price = slack + length * ds, dual + length * dz, price + length * dp
    weights: Array = slack[0] / slack[0].sum()
    return weights


def _by_dropping(gram: Array) -> Array | None:
    """The weights, if dropping what would be negative leads there: a few times faster, but no rule.

    None too if there may be other solutions.
    """
    if np.linalg.eigvalsh(gram)[0] < 1e-8:
        return None
    kept = np.arange(len(gram))
    while (part := np.linalg.solve(gram[np.ix_(kept, kept)], np.ones(len(kept)))).min() < 0:
        kept = np.delete(kept, part.argmin())
    weights = np.zeros(len(gram))
    weights[kept] = part / part.sum()
    slope = gram @ weights
    return weights if slope.min() >= slope[kept].min() - 1e-13 else None


def _step(
    inverse: Array, signs: Array, slack: Array, dual: Array, residual: Array, target: Array
) -> tuple[Array, Array, float]:
    """Newton's step that changes each slack * dual by `target`, at the same sum of weights."""
    free = _times(inverse, (signs * target / slack).sum(axis=0) - residual)
    toward = inverse.sum(axis=1)
    price = float(-free.sum() / toward.sum())
    ds = signs * (free + price * toward)
    return ds, (target - dual * ds) / slack, price


def _reach(value: Array, move: Array) -> float:
    """How far one may go along `move`, at most 1, with all values at least zero."""
    down = move < 0
    return float((-value[down] / move[down]).min(initial=1.0))


def _times(matrix: Array, vector: Array) -> Array:
    """Matrix times vector, by hand: NumPy's BLAS has threads of its own, which cost more."""
    product: Array = (matrix * vector).sum(axis=1)
    return product


def _inverse(gram: Array, diagonal: Array) -> Array:
    """Inverse of gram + diagonal, on torch's threads."""
    matrix = torch.from_numpy(gram + np.diag(diagonal))
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix)).numpy()


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
