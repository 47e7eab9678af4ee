"""How well rare classes are found, against scikit-learn's numbers."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from fedkd.training.detection import Detection, area, sensitivity, uneven


def scores(classes: int, counts: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(labels), classes, generator=generator).mul(4).round().div(4)  # ties
    return logits + torch.eye(classes)[labels], labels


@pytest.mark.parametrize("seed", [0, 1])
def test_of_many_classes_the_numbers_are_means(seed: int) -> None:
    logits, labels = scores(4, [80, 40, 10, 3], seed)
    found = Detection.of(logits, labels)
    assert found is not None
    probabilities = torch.softmax(logits.double(), 1).numpy()
    expected = metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
    assert found.auc == pytest.approx(expected)
    assert found.balanced_accuracy == pytest.approx(
        metrics.balanced_accuracy_score(labels, logits.argmax(1))
    )
    parts = []
    for number in range(4):
        wrong, right, _ = metrics.roc_curve(labels == number, probabilities[:, number])
        parts.append(right[wrong <= 0.05 + 1e-9].max())
    assert found.sensitivity == pytest.approx(np.mean(parts))


@pytest.mark.parametrize(("counts", "rare"), [([90, 12], 1), ([12, 90], 0)])
def test_of_two_classes_the_rarer_one_is_to_be_found(counts: list[int], rare: int) -> None:
    logits, labels = scores(2, counts)
    found = Detection.of(logits, labels)
    assert found is not None
    chance = torch.softmax(logits.double(), 1)[:, rare]
    assert found.auc == pytest.approx(metrics.roc_auc_score(labels == rare, chance))
    assert found.sensitivity == sensitivity(chance[labels == rare], chance[labels != rare])


def test_ties_are_no_help() -> None:
    tied = torch.ones(10)
    assert (area(tied, tied), sensitivity(tied, tied)) == (0.5, 0.0)
    negatives = torch.arange(100.0)
    assert sensitivity(torch.tensor([94.0, 94.5, 99.0, 200.0]), negatives) == 0.75


def test_a_student_that_names_one_class_is_not_praised() -> None:
    labels = torch.tensor([0] * 95 + [1] * 5)
    constant = torch.tensor([[1.0, 0.0]]).expand(100, 2)
    assert Detection.of(constant, labels) == Detection(
        balanced_accuracy=0.5, auc=0.5, sensitivity=0.0
    )


def test_where_nothing_can_be_told_apart_nothing_is_said() -> None:
    one = Detection.of(torch.eye(3)[[1, 1]], torch.tensor([1, 1]))
    assert one == Detection(balanced_accuracy=1.0)
    assert Detection.of(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) is None


def test_uneven_is_twice_as_many_of_the_classes_that_occur() -> None:
    assert uneven(torch.tensor([0, 0, 2]))
    assert not uneven(torch.tensor([0, 0, 0, 2, 2]))
    assert not uneven(torch.tensor([1, 1]))
