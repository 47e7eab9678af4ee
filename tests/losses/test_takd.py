"""Teacher assistants: the smallest teacher alone."""

import torch

from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.kd import kd_loss
from fedkd.losses.takd import takd_loss


def _inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1:]


def _kd(student, *teachers, temperature=5.0):
    return torch.stack([kd_loss(student, t, temperature=temperature) for t in teachers]).mean(dim=0)


def test_takd_is_kd_from_the_smallest_teacher():
    student, teachers = _inputs()
    value = takd_loss(student, teachers, [9, 2, 5])
    torch.testing.assert_close(value, _kd(student, teachers[1]))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    (expected,) = torch.autograd.grad(_kd(student, teachers[1]).sum(), student)
    torch.testing.assert_close(gradient, expected)


def test_teachers_of_one_size_share_and_unknown_sizes_are_one_size():
    student, teachers = _inputs()
    torch.testing.assert_close(takd_loss(student, teachers, [2, 2, 5]), _kd(student, *teachers[:2]))
    for sizes in ([2, None, 5], [None] * 3, None):
        torch.testing.assert_close(takd_loss(student, teachers, sizes), _kd(student, *teachers))


def test_elementwise_repeats_the_official_formula():
    # nn.KLDivLoss() of the published training loop averages over all elements.
    student, teachers = _inputs()
    value = takd_loss(student, teachers[:1], temperature=10.0, reduction="elementwise").mean()
    expected = 100 * torch.nn.functional.kl_div(
        (student / 10).log_softmax(dim=1), (teachers[0] / 10).softmax(dim=1), reduction="mean"
    )
    torch.testing.assert_close(value, expected)


def test_where_the_smallest_is_silent_the_others_teach():
    student, teachers = _inputs()
    weights = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).double()
    value = takd_loss(student[:2], teachers[:2, :2], [9, 2], weights=weights)
    expected = torch.stack([_kd(student, teachers[1])[0], _kd(student, teachers[0])[1]])
    torch.testing.assert_close(value, expected)


def test_the_term_reads_sizes_from_the_ensemble():
    student, teachers = _inputs()
    who = tuple(Teacher(number, parameters=size) for number, size in enumerate((7, 8, 3)))
    ensemble = Ensemble(who, {Logits(): teachers}, torch.full((3, 5), 1 / 3).double())
    value = LOSSES.create("takd", temperature=2.0)({Logits(): student}, ensemble, None)
    torch.testing.assert_close(value, _kd(student, teachers[2], temperature=2.0))
