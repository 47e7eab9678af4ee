"""The shortest vector in a hull: cases by hand, conditions of optimality, the published machine."""

import numpy as np
import pytest

from fedkd.losses.min_norm import one_class, shortest
from tests.golden.published import published

GOLDEN = published("multi_teacher")


def _gram(*vectors):
    stacked = np.array(vectors, dtype=float)
    return stacked @ stacked.T


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1, 0], [0, 1]], [0.5, 0.5]),
        ([[1, 0], [0, 2]], [0.8, 0.2]),
        ([[1, 0], [2, 0]], [1, 0]),
        ([[1, 0], [-3, 0]], [0.75, 0.25]),
        ([[1, 1], [0, 0], [5, 2]], [0, 1, 0]),
        ([[3, 4]], [1]),
        ([[0, 0], [0, 0]], [0.5, 0.5]),
    ],
)
def test_small_cases(vectors, expected):
    for size in (1e-6, 1.0, 1e6):
        weights = shortest(_gram(*vectors) * size)
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_equal_vectors_share_the_weight():
    weights = shortest(_gram([1, 2], [1, 2], [1, 2]))
    np.testing.assert_allclose(weights, [1 / 3] * 3, atol=0.01)


def test_a_bound_holds():
    gram = _gram([1, 0], [2, 0], [4, 0])
    np.testing.assert_allclose(shortest(gram, 0.6), [0.6, 0.4, 0], atol=1e-9)
    np.testing.assert_allclose(shortest(gram, 0.4), [0.4, 0.4, 0.2], atol=1e-9)
    np.testing.assert_allclose(shortest(gram, 0.2), [1 / 3] * 3)


def _short_of_best(gram, weights, bound):
    """How much a linear step from `weights` to the best corner would still promise."""
    slope, left, best = gram @ weights, 1.0, 0.0
    for number in np.argsort(slope):
        share = min(bound, left)
        best, left = best + share * slope[number], left - share
    return (weights @ slope - best) / gram.diagonal().max()


@pytest.mark.parametrize("count", [2, 7, 40, 100])
@pytest.mark.parametrize("dimensions", [1, 5, 60])
@pytest.mark.parametrize("share", [1.0, 0.5, 2.5])
def test_nothing_shorter_exists(count, dimensions, share):
    generator = np.random.default_rng(count + dimensions)
    vectors = generator.normal(size=(count, dimensions)) + generator.integers(2)
    vectors[:: generator.integers(2, 4)] = vectors[0]  # some teachers are equal
    bound = min(1.0, share if share <= 1 else share / count)
    gram = vectors @ vectors.T
    weights = shortest(gram, bound)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights.min() >= 0
    assert weights.max() <= bound + 1e-9
    assert _short_of_best(gram, weights, bound) < 1e-10


def test_vectors_of_very_different_lengths():
    vectors = np.random.default_rng(0).normal(size=(9, 20))
    vectors *= 10.0 ** np.arange(-4, 5)[:, None]
    gram = vectors @ vectors.T
    assert _short_of_best(gram, shortest(gram), 1.0) < 1e-12


@pytest.mark.parametrize("number", range(7))
def test_the_published_machine_ends_early(number):
    case = GOLDEN["one_class"]["cases"][number]
    gram = np.array(case["gram"])
    np.testing.assert_allclose(one_class(gram, case["nu"]), case["weights"], atol=0.02)
    exact = shortest(gram, 1 / (case["nu"] * len(gram)))
    np.testing.assert_allclose(exact, case["weights"], atol=0.05)


def test_the_machine_comes_to_the_same_if_it_has_time():
    vectors = np.random.default_rng(0).normal(size=(10, 20))
    gram = vectors @ vectors.T
    machine = one_class(gram, 1 / (10 * 0.3), tolerance=1e-10)
    np.testing.assert_allclose(machine, shortest(gram, 0.3), atol=1e-5)
