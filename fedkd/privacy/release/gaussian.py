"""Exact privacy of Gaussian noise.

Releasing `f + N(0, sigma^2)` where one unit moves f by at most `sensitivity` is mu-GDP with
`mu = sensitivity / sigma`; compositions add in squares, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def delta_of(epsilon: float, mu: float) -> float:
    """Smallest delta of a mu-GDP mechanism at `epsilon` (Balle and Wang 2018, Theorem 8)."""
    if mu <= 0:
        return 0.0
    # Here, not above: a client on a real node starts a process per message and needs no scipy.
    from scipy.special import log_ndtr  # type: ignore[import-untyped]

    first = math.exp(log_ndtr(mu / 2 - epsilon / mu))
    second = math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
    return max(first - second, 0.0)


def epsilon_of(mu: float, delta: float) -> float:
    """Smallest epsilon of a mu-GDP mechanism at `delta`."""
    if delta_of(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high, mu) > delta:
        high *= 2
    return _root(lambda epsilon: delta_of(epsilon, mu) - delta, 0.0, high, 1e-9)


def mu_of(epsilon: float, delta: float) -> float:
    """Largest mu that is (epsilon, delta)-differentially private.

    References:
        Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018,
            https://arxiv.org/abs/1805.06530
    """
    high = 1.0
    while delta_of(epsilon, high) <= delta:
        high *= 2
    mu = _root(lambda mu: delta_of(epsilon, mu) - delta, 1e-12, high, 1e-12)
    while delta_of(epsilon, mu) > delta:  # the root is found from either side
        mu *= 1 - 1e-9
    return mu


def _root(function: Callable[[float], float], low: float, high: float, xtol: float) -> float:
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    return float(brentq(function, low, high, xtol=xtol))
