"""Epsilon against Google's dp-accounting, which shares no code with Opacus."""

from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedkd.privacy.accounting import Steps, epsilon, noise_for
from fedkd.privacy.ledger import Account, BudgetSpent, Ledger

DELTA = 1e-5
ORDERS = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))

# Rounds of DP-SGD as runs take them: (rate, noise, steps) one after the other.
SETTINGS: list[list[tuple[float, float, int]]] = [
    [(0.01, 1.0, 1000)],
    [(0.01, 0.7, 100)],
    [(0.05, 1.5, 400)],
    [(0.1, 1.2, 200)],
    [(0.1, 3.0, 2000)],
    [(0.25, 2.0, 80)],
    [(0.5, 4.0, 60)],
    [(1.0, 5.0, 10)],
    [(1.0, 20.0, 1)],
    [(0.064, 0.8, 16)],
    [(0.02, 1.1, 50)] * 3,  # three rounds
    [(0.02, 1.1, 50)] * 2,  # absent in one of them
    [(0.02, 1.1, 50)] * 4,  # killed and trained again
    [(0.02, 1.1, 50), (0.1, 2.0, 30)],  # two settings
]


def events(steps: list[tuple[float, float, int]]) -> dp_event.DpEvent:
    parts: list[dp_event.DpEvent] = []
    for rate, noise, count in steps:
        once: dp_event.DpEvent = dp_event.GaussianDpEvent(noise)
        if rate < 1:
            once = dp_event.PoissonSampledDpEvent(rate, once)
        parts.append(dp_event.SelfComposedDpEvent(once, count))
    return dp_event.ComposedDpEvent(parts)


@pytest.mark.parametrize("steps", SETTINGS, ids=str)
def test_renyi_accounting_is_that_of_another_library(steps: list[tuple[float, float, int]]) -> None:
    other = RdpAccountant(ORDERS)  # the same orders, so that both bound the same thing
    other.compose(events(steps))
    theirs = other.get_epsilon(DELTA)
    ours = epsilon([Steps(*s) for s in steps], DELTA)
    # Theirs is an upper bound between whole orders, ours exact there: see the next test.
    assert theirs * (1 - 2e-3) <= ours <= theirs * (1 + 1e-6)


def test_renyi_accounting_is_that_of_an_integral() -> None:
    rate, noise, count = 0.1, 1.2, 200
    x = np.linspace(-60, 60, 400_001)
    density = np.exp(-(x**2) / (2 * noise**2)) / (noise * np.sqrt(2 * np.pi))
    ratio = 1 + rate * np.expm1((2 * x - 1) / (2 * noise**2))
    bounds = []
    for order in ORDERS[10:60]:
        moment = np.trapezoid(density * ratio**order, x)
        divergence = count * np.log(moment) / (order - 1)
        extra = np.log1p(-1 / order) - (np.log(DELTA) + np.log(order)) / (order - 1)
        bounds.append(divergence + extra)
    assert epsilon([Steps(rate, noise, count)], DELTA) == pytest.approx(min(bounds), rel=1e-6)


@pytest.mark.parametrize("steps", SETTINGS[:4] + SETTINGS[7:11], ids=str)
def test_numerical_accounting_is_that_of_another_library(
    steps: list[tuple[float, float, int]],
) -> None:
    other = PLDAccountant()
    other.compose(events(steps))
    tight = other.get_epsilon(DELTA)
    history = [Steps(*s) for s in steps]
    ours = epsilon(history, DELTA, "prv")
    # Opacus' bound is an upper one, within its declared error of 0.01 and a little.
    assert tight - 1e-3 <= ours <= tight * 1.02 + 0.02
    assert ours <= epsilon(history, DELTA) + 1e-9


@pytest.mark.smoke
def test_order_and_grouping_do_not_matter() -> None:
    one, two = Steps(0.1, 1.2, 30), Steps(0.02, 0.9, 50)
    assert epsilon([one, two, one], DELTA) == epsilon([two, Steps(0.1, 1.2, 60)], DELTA)


@pytest.mark.smoke
def test_nothing_costs_nothing_and_more_costs_more() -> None:
    assert epsilon([], DELTA) == 0
    costs = [epsilon([Steps(0.1, 1.0, n)], DELTA) for n in (0, 1, 10, 100)]
    assert costs == sorted(costs)
    assert costs[0] == 0


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_calibrated_noise_stays_within_the_budget_and_wastes_little(target: float) -> None:
    noise = noise_for(target, DELTA, 0.1, 200)
    assert epsilon([Steps(0.1, noise, 200)], DELTA) <= target
    assert epsilon([Steps(0.1, noise * 0.99, 200)], DELTA) > target


@pytest.mark.parametrize(
    ("target", "rate", "count", "rounds"), [(2.0, 1.0, 5, 3), (0.5, 1.0, 1, 1), (8.0, 0.4, 12, 2)]
)
def test_noise_by_numerical_accounting_pays_for_all_rounds_and_no_more(
    target: float, rate: float, count: int, rounds: int, tmp_path: Path
) -> None:
    """The ledger composes round by round what the plan has calibrated for all of them at once."""
    noise = noise_for(target, DELTA, rate, count * rounds, "prv")
    spent = epsilon([Steps(rate, noise, count * rounds)], DELTA, "prv")
    assert 0.995 * target < spent <= target
    assert noise <= noise_for(target, DELTA, rate, count * rounds, "rdp")
    ledger = Ledger(tmp_path / "privacy.jsonl", Account(0, "", target, DELTA, "prv"))
    for number in range(1, rounds + 1):
        ledger.reserve(number, Steps(rate, noise, count))
    assert ledger.spent == spent
    with pytest.raises(BudgetSpent):
        ledger.reserve(rounds + 1, Steps(rate, noise, count))


def test_impossible_questions_are_named() -> None:
    with pytest.raises(ValueError, match="accountant"):
        epsilon([Steps(0.1, 1.0, 1)], DELTA, "gdp")
    with pytest.raises(ValueError, match="delta"):
        epsilon([Steps(0.1, 1.0, 1)], 0.0)
    with pytest.raises(ValueError, match="out of reach"):
        noise_for(1e-9, DELTA, 1.0, 1000)
    infinite = (0.1, float("inf"), 1)
    for wrong in ((0.0, 1.0, 1), (1.5, 1.0, 1), (0.1, 0.0, 1), infinite, (0.1, 1.0, -1)):
        with pytest.raises(ValueError, match="expected"):
            Steps(*wrong)
