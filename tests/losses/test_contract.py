"""What every registered loss keeps, whoever wrote it."""

from functools import partial

import pytest
import torch
from torch import Tensor

from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from tests.losses.contract import (
    NAMES,
    SINGLE,
    TOGETHER,
    VARIANTS,
    Loss,
    adapted,
    batch,
    call,
    each,
    in_order,
    run,
    title,
)

# Losses that are not least when the student repeats the teacher.
NOT_ZERO_AT_IDENTITY = {"ce", "wkd_l", "im", "fixmatch"}


SMOKE = ("dkd", "vrm", "fitnet")  # of logits, over pairs, with layers of its own
MIXES_CLASSES = {"hcd", "mmkd"}  # by layers of its own


def _named(variants):
    """Variants as test cases; the plain ones of some losses are smoke tests."""
    smoke = [pytest.mark.smoke]
    return [
        pytest.param(v, id=title(v), marks=smoke if v[0] in SMOKE and not v[1] else [])
        for v in variants
    ]


def _made(variant) -> Loss:
    return LOSSES.create(variant[0], **variant[1])


@pytest.fixture(params=_named((name, {}) for name in NAMES))
def plain(request: pytest.FixtureRequest) -> Loss:
    return _made(request.param)


@pytest.fixture(params=_named(VARIANTS))
def loss(request: pytest.FixtureRequest) -> Loss:
    return _made(request.param)


single = pytest.mark.parametrize("variant", _named(v for v in VARIANTS if v[0] in SINGLE))


def test_value_is_one_number_per_sample_or_one_in_all(plain):
    value, _, gradients = run(plain, *batch(plain))
    assert value.shape in {(6,), ()}
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_ZERO_AT_IDENTITY])
def test_a_student_that_repeats_the_teacher_has_no_loss(name):
    loss = LOSSES.create(name)
    if loss.reads != tuple(kind for kind in loss.needs if kind.per_sample):
        pytest.skip("projects first")
    _, teacher, targets, weights = batch(loss)
    if any(True for _ in adapted(loss, teacher, teacher).parameters()):
        pytest.skip("projects first")
    _, reduced, gradients = run(loss, teacher, teacher, targets, weights)
    assert abs(reduced) < 1e-4
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients.values())


@pytest.mark.parametrize("variant", _named(VARIANTS))
def test_order_of_samples_and_classes_does_not_matter(variant):
    loss = _made(variant)
    student, teacher, targets, weights = batch(loss)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    classes = torch.tensor([2, 0, 4, 1, 3])
    if variant[0] in MIXES_CLASSES:
        classes = torch.arange(5)
    value, reduced, gradients = run(loss, student, teacher, targets, weights)
    moved, moved_reduced, moved_gradients = run(
        loss,
        in_order(student, order, classes),
        in_order(teacher, order, classes),
        classes.argsort()[targets[order]],
        weights[order],
    )
    close = partial(torch.testing.assert_close, rtol=5e-4, atol=5e-5)
    close(moved, value if value.ndim == 0 else value[order])
    close(moved_reduced, reduced)
    for kind, gradient in in_order(gradients, order, classes).items():
        close(moved_gradients[kind], gradient, atol=5e-6)


def test_one_sample_and_two_classes_are_finite(loss):
    for size, classes in ((1, 5), (6, 2), (1, 2)):
        run(loss, *batch(loss, size, classes))


def _as(dtype, *sides):
    return [each(side, lambda t: t.to(dtype)) for side in sides]


def test_half_precision_is_computed_in_full(loss):
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher, targets, weights = batch(loss)
        half = _as(dtype, student, teacher)
        _, reduced, gradients = run(loss, *half, targets, weights)
        _, expected, slopes = run(loss, *_as(torch.float32, *half), targets, weights)
        torch.testing.assert_close(reduced.float(), expected, rtol=1e-3, atol=1e-4)
        for kind, gradient in gradients.items():
            torch.testing.assert_close(gradient.float(), slopes[kind], rtol=1e-2, atol=1e-4)


def test_saturated_predictions_are_finite(loss):
    student, teacher, targets, weights = batch(loss)
    sure_student, sure_teacher = (each(s, lambda t: 1e4 * t.sign()) for s in (student, teacher))
    for sides in (
        (sure_student, teacher), (student, sure_teacher), (sure_student, sure_teacher)
    ):  # fmt: skip
        for dtype in (torch.float32, torch.float16):
            if dtype == torch.float16 and getattr(loss.options, "relative", False):
                continue  # its slope at so small a teacher is no number of half precision
            run(loss, *_as(dtype, *sides), targets, weights)


def test_a_student_of_zeros_is_finite(loss):
    student, teacher, targets, weights = batch(loss)
    student = each(student, torch.zeros_like)
    _, _, gradients = run(loss, student, teacher, targets, weights)
    assert all(gradient.abs().max() < 1e3 for gradient in gradients.values())


@single
def test_a_teacher_counts_by_its_weight(variant):
    loss = _made(variant)
    student, teacher, targets, weights = batch(loss)
    _, reduced, gradients = run(loss, student, teacher, targets, weights)
    for share in (0.0, 0.5):
        _, part, slopes = run(loss, student, teacher, targets, share * weights)
        torch.testing.assert_close(part, share * reduced)
        for kind, gradient in gradients.items():
            atol = 1e-7 if share else 0
            torch.testing.assert_close(slopes[kind], share * gradient, rtol=1e-4, atol=atol)


@single
def test_a_sample_without_weight_drops_out(variant):
    loss = _made(variant)
    student, teacher, targets, weights = batch(loss)
    weights[2] = 0
    loss = adapted(loss, student, teacher).eval()
    found = []
    for change in (0, 3):
        moved = each(student, lambda t, c=change: t.index_fill(0, torch.tensor(2), c))
        read = {kind: tensor.requires_grad_() for kind, tensor in moved.items()}
        value = call(loss, read, teacher, targets, weights)
        value = value if value.ndim == 0 else (value * weights).mean()
        value.backward()
        found.append(value.detach())
        assert all(tensor.grad[2].abs().max() < 1e-12 for tensor in read.values())
    torch.testing.assert_close(*found)


def test_the_teacher_gets_no_gradient(plain):
    student, teacher, targets, weights = batch(plain)
    teacher = {kind: tensor.requires_grad_() for kind, tensor in teacher.items()}
    run(plain, student, teacher, targets, weights)
    assert all(tensor.grad is None for tensor in teacher.values())


def _together(
    loss: Loss, order: list[int], seeds: tuple[int, ...] = (0, 1, 2), **options: Tensor
) -> Tensor:
    """Gradient on the student's side for three teachers in some order."""
    student, _, targets, _ = batch(loss)
    drawn = [batch(loss, seed=seed)[1] for seed in seeds]
    teachers = [drawn[number] for number in order]
    loss = adapted(loss, student, *teachers)
    loss.eval()
    student = {kind: tensor.clone().requires_grad_() for kind, tensor in student.items()}
    weights = options.get("weights", torch.full((3, len(targets)), 1 / 3))
    ensemble = Ensemble(
        tuple(Teacher(number) for number in order),
        {kind: torch.stack([t[kind] for t in teachers]) for kind in loss.needs},
        weights[order],
    )
    value = loss(student, ensemble, targets if loss.needs_targets else None)
    value.mean().backward()
    return torch.cat([t.grad.flatten() for t in student.values() if t.grad is not None])


@pytest.mark.parametrize("name", [name for name in TOGETHER if name != "mmkd"])
def test_order_of_teachers_does_not_matter(name):
    loss = LOSSES.create(name)
    torch.testing.assert_close(_together(loss, [2, 0, 1]), _together(loss, [0, 1, 2]))


@pytest.mark.parametrize("name", TOGETHER)
def test_a_teacher_that_fusion_gives_no_weight_does_not_count(name):
    loss = LOSSES.create(name)
    weights = torch.tensor([[0.5], [0.0], [0.5]]).expand(3, 6)
    silenced = _together(loss, [0, 1, 2], weights=weights)
    other = _together(loss, [0, 1, 2], (0, 7, 2), weights=weights)
    torch.testing.assert_close(silenced, other)
    assert not torch.equal(_together(loss, [0, 1, 2], (5, 6, 7)), silenced)
