"""1 - CKA as a loss."""

import pytest
import torch

from fedkd.functional.similarity import linear_cka, rbf_cka, unbiased_cka
from fedkd.losses.cka import cka_loss
from tests.losses.contract import draw

SIMILARITIES = ["linear", "rbf", "unbiased"]


def test_it_is_one_less_the_measure():
    x, y = draw(8, 5), draw(8, 3, seed=1)
    torch.testing.assert_close(cka_loss(x, y), 1 - linear_cka(x, y))
    rbf = cka_loss(x, y, similarity="rbf", sigma=0.5)
    torch.testing.assert_close(rbf, 1 - rbf_cka(x, y, sigma=0.5))
    torch.testing.assert_close(cka_loss(x, y, similarity="unbiased"), 1 - unbiased_cka(x, y))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_rotated_copy_of_the_teacher_has_no_loss(similarity):
    teacher = draw(8, 4)
    student = (3 * teacher @ torch.linalg.qr(draw(4, 4, seed=1))[0]).requires_grad_()
    value = cka_loss(student, teacher, similarity=similarity)
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(value) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_cka_gradcheck(similarity):
    teacher = draw(7, 2, seed=1) + draw(7, 3)[:, :2]
    assert torch.autograd.gradcheck(
        lambda x: cka_loss(x, teacher, similarity=similarity), (draw(7, 3).requires_grad_(),)
    )
