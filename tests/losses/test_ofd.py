"""Overhaul of feature distillation: official numbers, margins, connectors."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedkd.knowledge.kinds import Stage
from fedkd.losses.base import TeacherWeights
from fedkd.losses.ofd import OFDLoss, connector, negative_mean, ofd_loss, ofd_margin
from tests.golden.published import published, repeats
from tests.losses.contract import draw

GOLDEN = published("features")
_double = GOLDEN.double


def test_ofd_repeats_the_official_code():
    case, maps = GOLDEN["official"]["ofd_partial_l2"], _double("map_s_4x4").requires_grad_()
    loss = ofd_loss(maps, _double("map_t_4x4"), _double("ofd_margin"))
    assert loss.shape == (2,)
    repeats(case, loss.sum(), maps, rel=1e-12, rtol=1e-12)


def test_margins_repeat_the_official_code():
    margin = ofd_margin(_double("bn_gamma"), _double("bn_beta"))
    torch.testing.assert_close(margin, _double("ofd_margin"), rtol=0, atol=1e-7)  # it is float32


def test_margins_of_extreme_batch_norms():
    gamma = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    beta = torch.tensor([0.0, 0.0, 4.0, -2.0, 2.0, 0.0], dtype=torch.float64)
    half = -math.sqrt(2 / math.pi)  # mean of the lower half of a normal distribution
    expected = torch.tensor([half, half, -3.0, -2.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(ofd_margin(gamma, beta), expected)


def test_the_margin_is_what_it_approximates():
    maps = 0.7 * draw(50, 2, 40, 40) + 0.3
    formula = ofd_margin(torch.full((2,), 0.7), torch.full((2,), 0.3))
    torch.testing.assert_close(negative_mean(maps).float(), formula, rtol=0.01, atol=0)
    assert (negative_mean(maps.relu()) == 0).all()


def test_a_silent_neuron_may_be_as_silent_as_it_likes():
    teacher = torch.tensor([-5.0, -5.0, -0.2, 2.0]).view(1, 1, 2, 2)
    student = torch.tensor([-9.0, 1.0, -0.5, -1.0]).view(1, 1, 2, 2)
    # Margin -1: silent and lower (0), silent and higher (2^2), silent and lower (0), active (3^2).
    loss = ofd_loss(student, teacher, torch.tensor([-1.0]))
    torch.testing.assert_close(loss, torch.tensor([13.0]))
    torch.testing.assert_close(
        ofd_loss(student, teacher, torch.tensor([-1.0]), scale=1e-3), 1e-3 * loss
    )


def test_it_equals_the_three_cases_of_the_paper():
    student, teacher = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    margin = torch.tensor([-0.3, -1.0], dtype=torch.float64)
    m = margin.view(1, 2, 1, 1)
    expected = (
        (student - m).square() * ((student > m) & (teacher <= m))
        + (student - teacher).square() * ((student > teacher) & (teacher > m) & (teacher <= 0))
        + (student - teacher).square() * (teacher > 0)
    ).sum(dim=(1, 2, 3))
    torch.testing.assert_close(ofd_loss(student, teacher, margin), expected)
    rows = torch.tensor([2, 0, 1])
    torch.testing.assert_close(ofd_loss(student[rows], teacher[rows], margin), expected[rows])


def test_ofd_gradcheck():
    student, teacher = draw(3, 2, 4, 4).requires_grad_(), draw(3, 2, 4, 4, seed=1)
    margin = torch.tensor([-0.3, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: ofd_loss(s, teacher, margin, scale=0.1), (student,))


def test_a_student_that_repeats_the_teacher_has_no_loss():
    maps = draw(3, 2, 4, 4).requires_grad_()
    loss = ofd_loss(maps, maps, negative_mean(maps))
    loss.sum().backward()
    # Below the margin it is lower than it must be, which is free.
    assert (loss == 0).all()
    assert (maps.grad == 0).all()


def _batch():
    torch.manual_seed(0)
    student = {Stage(-2): torch.randn(4, 3, 8, 8), Stage(-1): torch.randn(4, 4, 4, 4)}
    teacher = {Stage(-2): torch.randn(4, 5, 8, 8), Stage(-1): torch.randn(4, 6, 8, 8)}
    return student, teacher


def test_the_adapted_loss_weighs_stages_and_averages_largerdraw():
    student, teacher = _batch()
    loss = OFDLoss(stages=2, scale=0.01)
    ready = loss.adapted(student, teacher).eval()
    assert list(loss.parameters()) == []
    value = ready(student, teacher, None, TeacherWeights(torch.ones(4)))
    expected = torch.zeros(4)
    for weight, kind, connect in zip((0.005, 0.01), ready.needs, ready.connectors):
        hint = F.adaptive_avg_pool2d(teacher[kind], student[kind].shape[2:])
        margin = torch.stack([m[m < 0].mean() for m in hint.transpose(0, 1)])
        expected += weight * ofd_loss(connect(student[kind]), hint, margin)
    torch.testing.assert_close(value, expected)


def test_margins_travel_with_the_state():
    student, teacher = _batch()
    ready = OFDLoss(stages=2).adapted(student, teacher)
    assert {"margin0", "margin1"} <= set(ready.state_dict())
    assert len(list(ready.parameters())) == 2 * 3


def test_connectors_start_as_published():
    torch.manual_seed(0)
    convolution, norm = connector(64, 128)
    assert convolution.bias is None
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()


def test_sizes_that_do_not_fit_are_named():
    student, teacher = _batch()
    with pytest.raises(ValueError, match=r"\(8, 8\), larger than the teacher's \(4, 4\)"):
        OFDLoss(stages=2).adapted(teacher, student)
