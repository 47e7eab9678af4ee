"""What the losses over several teachers share, and what all of them keep."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.aekd import aekd_loss
from fedkd.losses.aver import aver_loss
from fedkd.losses.camkd import camkd_loss
from fedkd.losses.dgkd import dgkd_loss
from fedkd.losses.divergence import reweighted, squared_distances, weighted_kl
from fedkd.losses.ebkd import ebkd_loss
from fedkd.losses.kd import kd_loss
from fedkd.losses.takd import takd_loss
from tests.golden.published import published, repeats

# (student, teachers, targets, weights) -> losses (B,), and whether a published scale is known.
RULES = {
    "aver": lambda s, t, y, w: aver_loss(s, t, weights=w),
    "ebkd": lambda s, t, y, w: ebkd_loss(s, t, weights=w),
    "camkd": lambda s, t, y, w: camkd_loss(s, t, y, weights=w),
    "aekd": lambda s, t, y, w: aekd_loss(s, t, weights=w),
    "aekd-bounded": lambda s, t, y, w: aekd_loss(s, t, weights=w, nu=0.7, normalise=True),
    "dgkd": lambda s, t, y, w: dgkd_loss(s, t, weights=w),
    "takd": lambda s, t, y, w: takd_loss(s, t, weights=w),
}
ALL = sorted(RULES)


GOLDEN = published("multi_teacher")
OFFICIAL = {
    "average_loss": aver_loss,
    "aekd": aekd_loss,
    "aekd-svm": partial(aekd_loss, solver="svm"),
    "camkd": lambda s, t: camkd_loss(s, t, GOLDEN.double("targets").long(), scale="published"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_losses_of_several_teachers_repeat_the_official_code(name):
    case = GOLDEN["official"][f"multi_teacher_kl_{name.removesuffix('-svm')}"]
    student, teachers = GOLDEN.answers(torch.float32)
    value = OFFICIAL[name](student, teachers).mean()
    repeats(case, value, student, rel=1e-6, rtol=1e-5, atol=1e-7)


def test_aver_is_the_weighted_sum_of_kd():
    student, teachers = GOLDEN.answers()
    weights = torch.tensor([[0.2, 0, 1, 0.3], [0.3, 0, 0, 0.3], [0.5, 1, 0, 0.4]]).double()
    ensemble = Ensemble(tuple(map(Teacher, range(3))), {Logits(): teachers}, weights)
    value = LOSSES.create("aver", temperature=2.0)({Logits(): student}, ensemble, None)
    terms = [w * kd_loss(student, t, temperature=2.0) for w, t in zip(weights, teachers)]
    torch.testing.assert_close(value, torch.stack(terms).sum(dim=0), rtol=1e-12, atol=1e-14)


def _draw(teachers=3, size=4, classes=5, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(classes, (size,), generator=generator)
    weights = torch.rand(teachers, size, generator=generator, dtype=torch.float64) + 0.1
    return normal(size, classes), normal(teachers, size, classes), targets, weights / weights.sum(0)


def _gradient(rule, student, *arguments):
    student = student.clone().requires_grad_()
    value = RULES[rule](student, *arguments)
    return value.detach(), torch.autograd.grad(value.mean(), student)[0]


def test_weighted_kl_is_the_sum_of_weighted_kl_and_differentiates_like_it():
    student, teachers, _, weights = _draw(teachers=7)
    student.requires_grad_()
    value = weighted_kl(student, teachers, 3 * weights, temperature=2.5)
    terms = [3 * w * kd_loss(student, t, temperature=2.5) for w, t in zip(weights, teachers)]
    expected = torch.stack(terms).sum(dim=0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    (ours,) = torch.autograd.grad(value.square().sum(), student)
    (theirs,) = torch.autograd.grad(expected.square().sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_number_of_teachers_looked_at_in_one_go_does_not_matter(monkeypatch):
    student, teachers, _, weights = _draw(teachers=11)
    student.requires_grad_()
    whole = weighted_kl(student, teachers, weights)
    monkeypatch.setattr("fedkd.losses.divergence._BLOCK", {"cpu": 3 * student.numel()})
    parts = weighted_kl(student, teachers, weights)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (whole, parts)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_no_teacher_no_loss():
    student, teachers, _, weights = _draw()
    student.requires_grad_()
    value = weighted_kl(student, teachers[:0], weights[:0])
    value.sum().backward()
    assert (value == 0).all()
    assert (student.grad == 0).all()


def test_reweighted_sums_to_one_or_keeps_what_was():
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    scores = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    expected = torch.tensor([[0.75, 0.5], [0.25, 0.5]])
    torch.testing.assert_close(reweighted(weights, scores), expected)


def test_squared_distances_of_maps_of_different_sizes():
    ours = [torch.zeros(2, 3, 4, 4), torch.ones(2, 5, 2, 2)]
    theirs = [torch.full((2, 3, 4, 4), 2.0), torch.ones(2, 5, 2, 2)]
    theirs[1][1] += 3
    expected = torch.tensor([[4.0, 4.0], [0.0, 9.0]])
    torch.testing.assert_close(squared_distances(ours, theirs), expected)


@pytest.mark.parametrize("rule", ALL)
def test_one_teacher_is_plain_distillation(rule):
    student, teachers, targets, weights = _draw(teachers=1)
    temperature = 5.0 if rule in {"dgkd", "takd"} else 4.0
    for known in (weights, None):
        value = RULES[rule](student, teachers, targets, known)
        torch.testing.assert_close(value, kd_loss(student, teachers[0], temperature=temperature))


@pytest.mark.parametrize("rule", ALL)
def test_a_student_that_equals_all_teachers_has_no_loss(rule):
    student, _, targets, weights = _draw()
    value, gradient = _gradient(rule, student, student.expand(3, -1, -1), targets, weights)
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(2, 7), st.integers(0, 10**6))
@pytest.mark.parametrize("rule", ALL)
def test_order_of_samples_classes_and_teachers_does_not_matter(rule, count, size, classes, seed):
    student, teachers, targets, weights = _draw(count, size, classes, seed)
    generator = torch.Generator().manual_seed(seed)
    m, b, c = (torch.randperm(n, generator=generator) for n in (count, size, classes))
    value, gradient = _gradient(rule, student, teachers, targets, weights)
    moved, moved_gradient = _gradient(
        rule,
        student[b][:, c],
        teachers[m][:, b][:, :, c],
        c.argsort()[targets[b]],
        weights[m][:, b],
    )
    if rule.startswith("aekd") and count >= classes:
        # More teachers than dimensions: many weights are best, and only their mean gradient
        # without fusion weights is the same for sure.
        return
    torch.testing.assert_close(moved, value[b], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(moved_gradient, gradient[b][:, c], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", ALL)
def test_a_constant_per_row_changes_nothing(rule):
    student, teachers, targets, weights = _draw()
    plain = RULES[rule](student, teachers, targets, weights)
    shifted = RULES[rule](student + 7, teachers - 3, targets, weights)
    torch.testing.assert_close(shifted, plain)


@pytest.mark.parametrize("rule", ALL)
def test_half_precision_is_computed_in_full(rule):
    for dtype in (torch.float16, torch.bfloat16):
        student, teachers, targets, weights = _draw()
        student, teachers = student.to(dtype), teachers.to(dtype)
        value, gradient = _gradient(rule, student, teachers, targets, weights)
        exact, slope = _gradient(rule, student.float(), teachers.float(), targets, weights)
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        torch.testing.assert_close(value, exact)
        torch.testing.assert_close(gradient.float(), slope, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("rule", ALL)
def test_saturated_predictions_are_finite(rule):
    for sure, classes in itertools.product(("student", "teachers", "both"), (2, 5)):
        student, teachers, targets, weights = _draw(classes=classes)
        if sure != "teachers":
            student = 1e4 * student.sign()
        if sure != "student":
            teachers = 1e4 * teachers.sign()
        for size in (1, 4):
            value, gradient = _gradient(
                rule, student[:size].float(), teachers[:, :size], targets[:size], weights[:, :size]
            )
            assert value.isfinite().all()
            assert gradient.isfinite().all()
