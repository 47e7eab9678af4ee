"""1 - CKA as a loss."""

import pytest
import torch

from fedkd.functional.similarity import linear_cka, rbf_cka, unbiased_cka
from fedkd.knowledge.kinds import Pooled
from fedkd.losses.base import TeacherWeights
from fedkd.losses.cka import CKALoss, cka_loss

SIMILARITIES = ["linear", "rbf", "unbiased"]


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_one_less_the_measure():
    x, y = _draw(8, 5), _draw(8, 3, seed=1)
    torch.testing.assert_close(cka_loss(x, y), 1 - linear_cka(x, y))
    rbf = cka_loss(x, y, similarity="rbf", sigma=0.5)
    torch.testing.assert_close(rbf, 1 - rbf_cka(x, y, sigma=0.5))
    torch.testing.assert_close(cka_loss(x, y, similarity="unbiased"), 1 - unbiased_cka(x, y))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_rotated_copy_of_the_teacher_has_no_loss(similarity):
    teacher = _draw(8, 4)
    student = (3 * teacher @ torch.linalg.qr(_draw(4, 4, seed=1))[0]).requires_grad_()
    value = cka_loss(student, teacher, similarity=similarity)
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(value) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_trust_is_a_measure_on_samples(similarity):
    loss = CKALoss(similarity=similarity)
    student, teacher = _draw(8, 5).requires_grad_(), {Pooled(): _draw(8, 3, seed=1)}
    weights = torch.tensor([1.0, 0, 0.5, 1, 1, 0.2, 1, 1])
    value = loss({Pooled(): student}, teacher, None, TeacherWeights(weights))
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient[1] == 0).all()
    assert (gradient[2] != 0).all()
    half = loss({Pooled(): student}, teacher, None, TeacherWeights(weights / 2))
    torch.testing.assert_close(half, value / 2)
    silent = loss({Pooled(): student}, teacher, None, TeacherWeights(torch.zeros(8)))
    (gradient,) = torch.autograd.grad(silent, student)
    assert silent == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "scale"), [(1, 1.0), (2, 1.0), (6, 0.0), (6, 1e4)])
def test_edges_are_finite(similarity, dtype, size, scale):
    student = (scale * _draw(size, 5)).to(dtype).requires_grad_()
    value = cka_loss(student, _draw(size, 3, seed=1).to(dtype), similarity=similarity)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.dtype == dtype
    full = student.detach().float()
    expected = cka_loss(full, _draw(size, 3, seed=1).to(dtype).float(), similarity=similarity)
    torch.testing.assert_close(value.float(), expected)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_cka_gradcheck(similarity):
    teacher = _draw(7, 2, seed=1) + _draw(7, 3)[:, :2]
    assert torch.autograd.gradcheck(
        lambda x: cka_loss(x, teacher, similarity=similarity), (_draw(7, 3).requires_grad_(),)
    )


def test_sigma_must_be_positive():
    with pytest.raises(ValueError, match="loss 'cka': sigma must be positive, got 0"):
        CKALoss(sigma=0)
