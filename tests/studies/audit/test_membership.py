"""Attacks on membership against values worked out by hand."""

import numpy as np
import pytest
import torch

from fedkd.studies.audit.membership import (
    calibrated,
    clopper_pearson,
    confidence,
    halves,
    likelihood_ratio,
    membership,
)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_confidence_is_the_logit_of_the_label_probability() -> None:
    # p = 0.5, 0.25, 0.25 for logits log 2, 0, 0.
    logits = torch.tensor([[np.log(2.0), 0.0, 0.0], [1000.0, 0.0, 0.0]])
    first, second = confidence(logits, torch.tensor([1, 0]))
    assert first == pytest.approx(np.log(0.25 / 0.75))
    assert second == pytest.approx(1000 - np.log(2))  # saturated, and still finite


def test_auc_counts_pairs_and_halves_ties() -> None:
    # Of six pairs, 3 > {1, 2, 2} are won three times; 2 beats 1 and ties twice: (3 + 1 + 1) / 6.
    found = membership(np.array([3.0, 2.0]), np.array([1.0, 2.0, 2.0]), generator())
    assert found.auc == pytest.approx(5 / 6)
    assert found.tpr == 0.5  # with three others, none may be accused
    assert (found.members, found.others) == (2, 3)


def test_one_of_a_hundred_others_may_be_accused() -> None:
    others = np.arange(100.0)
    found = membership(np.array([98.5, 99.5, 97.5, 98.0]), others, generator())
    assert found.tpr == 0.5  # above 98, the second largest of the others


def test_perfect_and_hopeless_attacks() -> None:
    low, high = np.zeros(50), np.ones(50)
    assert membership(high, low, generator()).auc_interval == pytest.approx((1.0, 1.0))
    assert membership(high, low, generator()).leaks
    same = membership(low, low, generator())
    assert same.auc == 0.5
    assert same.tpr == 0.0
    assert not same.leaks
    with pytest.raises(ValueError, match="images of both kinds"):
        membership(low, low[:0], generator())


def test_intervals_hold_guessing_as_often_as_they_say() -> None:
    draws, covered = np.random.default_rng(1), 0
    for _ in range(100):
        low, high = membership(draws.normal(size=60), draws.normal(size=60), draws).auc_interval
        covered += low <= 0.5 <= high
    assert covered >= 88  # 95 expected; below 88 in one of 700 times


def test_clopper_pearson_at_its_ends_and_in_a_table() -> None:
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert clopper_pearson(10, 10) == pytest.approx((0.025**0.1, 1.0))
    assert clopper_pearson(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)


def test_every_image_is_in_half_of_the_shadows() -> None:
    inside = halves(6, 40, generator())
    assert inside.shape == (6, 40)
    assert (inside.sum(0) == 3).all()
    with pytest.raises(ValueError, match="even number from 2, got 3"):
        halves(3, 10, generator())


def test_scores_of_two_shadows_by_hand() -> None:
    # Out: (0, 2 | image 0), (1, 3 | image 1), means 1 and 2, variance (1 + 1 + 1 + 1) / 2 = 2.
    shadows = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    inside = np.array([[False] * 2, [False] * 2, [True] * 2, [True] * 2])
    target = np.array([1.0, 6.0])
    assert calibrated(target, shadows, inside) == pytest.approx([0.0, 4 / np.sqrt(2)])
    # In: means 5 and 6, the same variance: ((t - out)^2 - (t - in)^2) / (2 * 2).
    expected = [(0 - 16) / 4, (16 - 0) / 4]
    assert likelihood_ratio(target, shadows, inside) == pytest.approx(expected)


def test_finding_some_members_for_sure_is_a_leak_even_if_the_area_is_a_half() -> None:
    # The tenth that is found is made up for by a tenth that scores below everybody.
    others = np.arange(200.0)
    members = np.concatenate([np.full(20, 1e3), np.arange(160.0) + 20.5, np.full(20, -1.0)])
    found = membership(members, others, generator())
    assert found.auc_interval[0] < 0.5
    assert found.tpr == 0.1
    assert found.leaks
    # 3 of 200 at 1 % allowed are within what an uncertain threshold lets through.
    few = np.concatenate([np.full(3, 1e3), np.arange(197.0)])
    assert not membership(few, others, generator()).leaks
