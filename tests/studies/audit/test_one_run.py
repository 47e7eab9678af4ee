"""The bound on epsilon against values worked out by hand."""

import math

import numpy as np
import pytest

from fedkd.studies.audit.one_run import audit_scores, epsilon_bound, p_value


def test_without_delta_the_p_value_is_a_binomial_tail() -> None:
    assert p_value(4, 4, 4, 0.0, 0.0) == pytest.approx(1 / 16)
    assert p_value(9, 4, 3, 0.0, 0.0) == pytest.approx(5 / 16)
    assert p_value(4, 4, 4, math.log(3), 0.0) == pytest.approx(0.75**4)
    assert p_value(4, 4, 0, 0.0, 0.1) == 1.0


def test_delta_adds_the_steepest_slope_of_the_tail() -> None:
    # Tail of two coins: 1, 3/4, 1/4. Slopes (3/4 - 1/4) / 1 and (1 - 1/4) / 2: the first is
    # steeper. 1/4 + 2 * 10 * 0.01 * 1/2.
    assert p_value(10, 2, 2, 0.0, 0.01) == pytest.approx(0.35)


def test_all_right_of_ten() -> None:
    # q^10 = 0.05 at q = 0.7411, and epsilon = log(q / (1 - q)).
    rate = 0.05**0.1
    assert epsilon_bound(10, 10, 10, 0.0) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    assert epsilon_bound(10, 10, 8, 0.0) == 0.0  # 56 of 1024 is more than 0.05


def test_delta_and_wrong_guesses_lower_the_bound() -> None:
    best = epsilon_bound(200, 200, 200, 1e-5)
    assert best > epsilon_bound(200, 200, 200, 1e-3) > 0
    assert best > epsilon_bound(200, 200, 180, 1e-5) > epsilon_bound(200, 200, 150, 1e-5) > 0


def test_perfect_scores_reach_the_largest_bound_and_useless_ones_nothing() -> None:
    included = np.arange(100) % 2 == 0
    perfect = audit_scores(included.astype(float), included, 1e-5)
    assert perfect.epsilon == perfect.largest > 2
    assert perfect.right == perfect.guesses
    useless = audit_scores(np.random.default_rng(0).random(100), included, 1e-5)
    assert useless.epsilon == 0.0
    assert useless.largest == perfect.largest
    with pytest.raises(ValueError, match="not finite"):
        audit_scores(np.full(100, np.nan), included, 1e-5)


def test_the_bound_of_a_private_mechanism_stays_below_its_epsilon() -> None:
    # Randomised response tells each coin rightly with probability e / (1 + e): epsilon is 1.
    draws, wrong = np.random.default_rng(0), 0
    for _ in range(20):
        included = draws.random(200) < 0.5
        guesses = np.where(draws.random(200) < math.e / (1 + math.e), included, ~included)
        wrong += audit_scores(guesses + 1e-3 * draws.random(200), included, 0.0).epsilon > 1
    assert wrong <= 1
