"""Weights by agreement of gradients: official numbers, least mean gradient."""

import pytest
import torch

from fedkd.losses.aekd import aekd_loss, agreement_weights
from fedkd.losses.kd import kd_loss
from tests.golden.published import published

GOLDEN = published("multi_teacher")
_inputs = GOLDEN.answers


def _mean_gradients(student, teachers, temperature=4.0):
    """By autograd, one backward per teacher as published, (M, C)."""
    losses = [kd_loss(student, t, temperature=temperature).mean() for t in teachers]
    return torch.stack([torch.autograd.grad(v, student)[0].mean(dim=0) for v in losses])


def test_no_other_weights_have_a_shorter_mean_gradient():
    student, teachers = _inputs()
    gradients = _mean_gradients(student, teachers)
    found = agreement_weights(student, teachers)
    least = (found @ gradients).norm()
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 51, dtype=torch.float64)] * 2)
    grid = torch.cat([grid, 1 - grid.sum(dim=1, keepdim=True)], dim=1)
    grid = grid[grid[:, 2] >= 0]
    assert least <= (grid @ gradients).norm(dim=1).min() + 1e-12
    # Along it, all teachers with a weight would be served alike, and none badly.
    served = gradients @ (found @ gradients)
    torch.testing.assert_close(
        served[found > 1e-6], least.square().expand(int((found > 1e-6).sum()))
    )
    assert (served >= least.square() - 1e-12).all()


def test_normalised_gradients_weigh_directions():
    student, teachers = _inputs()
    gradients = _mean_gradients(student, teachers)
    lengths = gradients.norm(dim=1)
    found = agreement_weights(student, teachers, normalise=True)
    directions = found * lengths / (found * lengths).sum()
    served = (gradients / lengths[:, None]) @ (directions @ (gradients / lengths[:, None]))
    assert found.sum().item() == pytest.approx(1)
    kept = directions > 1e-6
    torch.testing.assert_close(served[kept], served[kept].min().expand(int(kept.sum())))


def test_nu_bounds_the_weights():
    student, teachers = _inputs()
    free = agreement_weights(student, teachers)
    bounded = agreement_weights(student, teachers, nu=1 / (0.4 * 3))
    assert free.max() > 0.5
    torch.testing.assert_close(bounded.max(), torch.tensor(0.4, dtype=torch.float64))
    even = agreement_weights(student, teachers, nu=1.0)
    torch.testing.assert_close(even, torch.full_like(even, 1 / 3))
    # Less than a share of 1 / M asks for nothing.
    torch.testing.assert_close(agreement_weights(student, teachers, nu=0.01), free)


def test_teachers_that_pull_in_opposite_directions_leave_nothing_to_learn():
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teachers = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]], dtype=torch.float64)
    value = aekd_loss(student, teachers)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.item() > 0
    assert gradient.abs().max() < 1e-9


def test_fusion_weights_gate_samples_and_teachers():
    student, teachers = _inputs()
    weights = torch.tensor([[0.5, 1, 0, 0.5], [0, 0, 0, 0], [0.5, 0, 1, 0.5]]).double()
    found = agreement_weights(student, teachers, weights=weights)
    assert found[1] == 0
    value = aekd_loss(student, teachers, weights=weights)
    alone = [kd_loss(student, teacher) for teacher in teachers]
    torch.testing.assert_close(value[1], alone[0][1])
    torch.testing.assert_close(value[2], alone[2][2])
    torch.testing.assert_close(value[0], found[0] * alone[0][0] + found[2] * alone[2][0])


def test_a_hundred_teachers_with_more_say_than_classes():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(32, 10, generator=generator).requires_grad_()
    teachers = torch.randn(100, 32, 10, generator=generator) + student.detach()
    value = aekd_loss(student, teachers)
    (gradient,) = torch.autograd.grad(value.mean(), student)
    assert value.isfinite().all()
    assert gradient.mean(dim=0).norm() < 1e-6
