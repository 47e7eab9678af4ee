"""Each teacher is matched among the classes that it knows."""

import math

import pytest
import torch

from fedkd.losses.kd import kd_loss
from fedkd.losses.subset_kd import subset_kd_loss

STUDENT = torch.tensor([[2.0, -1.0, 0.5, 1.0], [0.0, 3.0, -2.0, 1.0]], dtype=torch.float64)
_ = -math.inf
TEACHER = torch.tensor([[1.0, _, 3.0, _], [0.5, _, 0.5, _]], dtype=torch.float64)
OWN = [0, 2]


def test_it_is_kd_among_the_teachers_own_classes() -> None:
    expected = kd_loss(STUDENT[:, OWN], TEACHER[:, OWN], temperature=3.0)
    assert torch.allclose(subset_kd_loss(STUDENT, TEACHER, temperature=3.0), expected)


def test_a_teacher_of_all_classes_is_matched_as_by_kd() -> None:
    whole = TEACHER.nan_to_num(neginf=0.3)
    assert torch.allclose(subset_kd_loss(STUDENT, whole), kd_loss(STUDENT, whole))


def test_what_a_teacher_does_not_know_pulls_at_nothing() -> None:
    student = STUDENT.clone().requires_grad_()
    subset_kd_loss(student, TEACHER).sum().backward()
    assert student.grad is not None
    assert student.grad[:, [1, 3]].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert torch.allclose(student.grad.sum(dim=1), torch.zeros(2).double(), atol=1e-12)
    assert student.grad[0, 0].abs() > 1e-3


def test_one_that_is_undecided_among_its_own_says_nothing_by_entropy() -> None:
    plain = subset_kd_loss(STUDENT, TEACHER)
    sure = subset_kd_loss(STUDENT, TEACHER, mine="entropy")
    assert sure[1] == pytest.approx(0.0, abs=1e-12)
    p = math.exp(3) / (math.exp(1) + math.exp(3))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert float(sure[0] / plain[0]) == pytest.approx(1 - entropy)
