"""Weights by entropy: numbers of the published formula, sure teachers."""

import pytest
import torch

from fedkd.losses.ebkd import ebkd_loss, entropy_weights
from fedkd.losses.kd import kd_loss
from tests.golden.published import published

GOLDEN = published("multi_teacher")
_double = GOLDEN.double
TEACHERS = GOLDEN.answers()[1]


def test_entropy_weights_are_the_published_ones_over_their_sum():
    expected = torch.tensor(GOLDEN["derived"]["ebkd_normalised"], dtype=torch.float64)
    torch.testing.assert_close(entropy_weights(TEACHERS), expected, rtol=1e-12, atol=0)


def test_the_published_scale_repeats_the_published_weights_and_divisors():
    student, teachers = _double("logits_s").requires_grad_(), TEACHERS
    weights = torch.tensor(GOLDEN["derived"]["ebkd_code_weight"], dtype=torch.float64)
    terms = torch.stack([kd_loss(student, teacher) for teacher in teachers])
    expected = (weights * terms).sum() / (4 * 3)
    value = ebkd_loss(student, teachers, scale="published").mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(v, student)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    plain = ebkd_loss(student, teachers).mean()
    torch.testing.assert_close(value, plain * 2 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_entropy_of_sure_teachers_is_zero_and_not_nan(dtype):
    sure, unsure = torch.tensor([[200.0, 0, 0]]), torch.zeros(1, 3)
    found = entropy_weights(torch.stack([sure, sure, unsure]).to(dtype))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 0.5, 0.0]))
    all_sure = entropy_weights(torch.stack([sure, sure]).to(dtype))
    assert all_sure[:, 0].tolist() == [0.5, 0.5]


def test_a_high_entropy_temperature_makes_teachers_alike():
    weights = entropy_weights(TEACHERS, temperature=1e4)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3), rtol=1e-5, atol=0)
    student = _double("logits_s")
    cold = ebkd_loss(student, TEACHERS, entropy_temperature=0.5)
    assert not torch.allclose(cold, ebkd_loss(student, TEACHERS))


def test_a_single_teacher_counts_nothing_at_the_published_scale():
    student, teachers = _double("logits_s"), TEACHERS[:1]
    assert (ebkd_loss(student, teachers, scale="published") == 0).all()
    torch.testing.assert_close(ebkd_loss(student, teachers), kd_loss(student, teachers[0]))
