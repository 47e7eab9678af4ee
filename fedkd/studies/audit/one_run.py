"""A lower bound on epsilon from one training with canaries.

Each of m canaries was trained on or not by the toss of a coin. Who guesses better than
differential privacy allows has refuted it.

References:
    Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
    Theorem 5.2, https://arxiv.org/abs/2305.08846
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom  # type: ignore[import-untyped]

SHARES = (1.0, 0.5, 0.25, 0.1)
"""Shares of the canaries that are guessed at, the surest; each try costs confidence."""

_LARGEST = 60.0


@dataclass(frozen=True)
class Bound:
    """What one training showed.

    Attributes:
        epsilon: The mechanism is not (epsilon', delta)-private for any smaller epsilon'.
        largest: What perfect guessing would have shown: the audit cannot see beyond it.
        delta: Of the statement.
        confidence: That the bound holds.
        canaries: Tossed for.
        guesses: Made by the best try.
        right: Of these.
    """

    epsilon: float
    largest: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    right: int


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Largest chance of so many right guesses if the training were (epsilon, delta)-private."""
    truth = 1 / (1 + math.exp(-epsilon))
    # tail[v] = P[Binomial(guesses, truth) >= v]
    tail = binom.sf(np.arange(right + 1) - 1, guesses, truth)
    excess = 0.0
    if right > 0:
        steps = np.arange(1, right + 1)
        excess = max(0.0, float(((tail[right - steps] - tail[right]) / steps).max()))
    return min(1.0, float(tail[right]) + 2 * canaries * delta * excess)


def epsilon_bound(
    canaries: int, guesses: int, right: int, delta: float, *, alpha: float = 0.05
) -> float:
    """Smallest epsilon that this many right guesses leave possible, at confidence 1 - alpha."""
    if p_value(canaries, guesses, right, 0.0, delta) > alpha:
        return 0.0
    low, high = 0.0, _LARGEST
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) <= alpha:
            low = middle
        else:
            high = middle
    return low


def audit_scores(
    scores: np.ndarray, included: np.ndarray, delta: float, *, alpha: float = 0.05
) -> Bound:
    """Guess the highest scores in and the lowest out, for several numbers of guesses.

    Args:
        scores: (m,), higher for canaries that seem to have been trained on.
        included: (m,), whether they were; tossed independently and evenly.
        delta: Of the claim that is audited.
        alpha: Chance that the bound is wrong, shared among the tries.

    Raises:
        ValueError: scores that are not finite, which have no order.
    """
    if not np.isfinite(scores).all():
        raise ValueError("canaries: the teacher's answers are not finite")
    total, each = len(scores), alpha / len(SHARES)
    order = np.argsort(-scores, kind="stable")
    tries = []
    for share in SHARES:
        half = int(share * total) // 2
        high, low = order[:half], order[total - half :]
        right = int(included[high].sum() + (~included[low]).sum())
        bound = epsilon_bound(total, 2 * half, right, delta, alpha=each)
        tries.append((bound, 2 * half, right))
    epsilon, guesses, right = max(tries, key=lambda found: found[0])
    return Bound(
        epsilon=epsilon,
        largest=max(epsilon_bound(total, count, count, delta, alpha=each) for _, count, _ in tries),
        delta=delta,
        confidence=1 - alpha,
        canaries=total,
        guesses=guesses,
        right=right,
    )
