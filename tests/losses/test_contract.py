"""What every registered loss keeps, whoever wrote it."""

import pytest
import torch
from torch import Tensor

from fedkd.knowledge.kinds import Kind
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, Trust

NAMES = LOSSES.names()
# Losses that are not least when the student repeats the teacher.
NOT_ZERO_AT_IDENTITY = {"ce"}


def _batch(
    loss: DistillationLoss, size: int = 6, classes: int = 5, seed: int = 0
) -> tuple[dict[Kind, Tensor], dict[Kind, Tensor], Tensor, Tensor]:
    """Student, teacher, targets and weights of a made-up batch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(kinds: tuple[Kind, ...]) -> dict[Kind, Tensor]:
        return {
            kind: torch.randn(size, *kind.shape(classes), generator=generator) for kind in kinds
        }

    targets = torch.randint(classes, (size,), generator=generator)
    weights = torch.rand(size, generator=generator)
    return draw(loss.reads), draw(loss.needs), targets, weights


def _run(
    loss: DistillationLoss,
    student: dict[Kind, Tensor],
    teacher: dict[Kind, Tensor],
    targets: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, dict[Kind, Tensor]]:
    """Raw value, what the objective makes of it, and the gradients."""
    student = {kind: tensor.clone().requires_grad_() for kind, tensor in student.items()}
    value = loss(student, teacher, targets if loss.needs_targets else None, Trust(weights))
    reduced = value if value.ndim == 0 else (value * weights).mean()
    reduced.backward()
    gradients = {}
    for kind, tensor in student.items():
        assert tensor.grad is not None, f"no gradient reaches {kind}"
        assert tensor.grad.dtype == tensor.dtype
        assert tensor.grad.isfinite().all(), f"the gradient of {kind} is not finite"
        gradients[kind] = tensor.grad
    assert value.isfinite().all()
    return value.detach(), reduced.detach(), gradients


@pytest.fixture(params=NAMES)
def loss(request: pytest.FixtureRequest) -> DistillationLoss:
    torch.manual_seed(0)  # for losses with parameters
    return LOSSES.create(request.param)


def test_value_is_one_number_per_sample_or_one_in_all(loss):
    value, _, gradients = _run(loss, *_batch(loss))
    assert value.shape in {(6,), ()}
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_ZERO_AT_IDENTITY])
def test_a_student_that_repeats_the_teacher_has_no_loss(name):
    loss = LOSSES.create(name)
    if loss.reads != loss.needs:
        pytest.skip("projects first")
    _, teacher, targets, weights = _batch(loss)
    _, reduced, gradients = _run(loss, teacher, teacher, targets, weights)
    assert abs(reduced) < 1e-4
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients.values())


def test_order_of_samples_does_not_matter(loss):
    student, teacher, targets, weights = _batch(loss)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    value, reduced, gradients = _run(loss, student, teacher, targets, weights)
    moved, moved_reduced, moved_gradients = _run(
        loss,
        {kind: tensor[order] for kind, tensor in student.items()},
        {kind: tensor[order] for kind, tensor in teacher.items()},
        targets[order],
        weights[order],
    )
    torch.testing.assert_close(moved, value if value.ndim == 0 else value[order])
    torch.testing.assert_close(moved_reduced, reduced)
    for kind, gradient in gradients.items():
        torch.testing.assert_close(moved_gradients[kind], gradient[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("size", "classes"), [(1, 5), (6, 2), (1, 2)])
def test_one_sample_and_two_classes_are_finite(loss, size, classes):
    _run(loss, *_batch(loss, size, classes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(loss, dtype):
    student, teacher, targets, weights = _batch(loss)
    student = {kind: tensor.to(dtype) for kind, tensor in student.items()}
    teacher = {kind: tensor.to(dtype) for kind, tensor in teacher.items()}
    _, reduced, gradients = _run(loss, student, teacher, targets, weights)
    _, expected, expected_gradients = _run(
        loss,
        {kind: tensor.float() for kind, tensor in student.items()},
        {kind: tensor.float() for kind, tensor in teacher.items()},
        targets,
        weights,
    )
    torch.testing.assert_close(reduced.float(), expected, rtol=1e-3, atol=1e-4)
    for kind, gradient in gradients.items():
        torch.testing.assert_close(gradient.float(), expected_gradients[kind], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sure", ["student", "teacher", "both"])
def test_saturated_predictions_are_finite(loss, dtype, sure):
    student, teacher, targets, weights = _batch(loss)
    if sure != "teacher":
        student = {kind: 1e4 * tensor.sign() for kind, tensor in student.items()}
    if sure != "student":
        teacher = {kind: 1e4 * tensor.sign() for kind, tensor in teacher.items()}
    _run(
        loss,
        {kind: tensor.to(dtype) for kind, tensor in student.items()},
        {kind: tensor.to(dtype) for kind, tensor in teacher.items()},
        targets,
        weights,
    )


def test_a_student_that_says_nothing_yet_is_finite(loss):
    student, teacher, targets, weights = _batch(loss)
    student = {kind: torch.zeros_like(tensor) for kind, tensor in student.items()}
    _, _, gradients = _run(loss, student, teacher, targets, weights)
    assert all(gradient.abs().max() < 1e3 for gradient in gradients.values())


def test_a_teacher_without_weight_has_no_say(loss):
    student, teacher, targets, weights = _batch(loss)
    _, reduced, gradients = _run(loss, student, teacher, targets, torch.zeros_like(weights))
    assert reduced == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_half_the_weight_is_half_the_loss(loss):
    student, teacher, targets, weights = _batch(loss)
    _, reduced, gradients = _run(loss, student, teacher, targets, weights)
    _, half, half_gradients = _run(loss, student, teacher, targets, weights / 2)
    torch.testing.assert_close(half, reduced / 2)
    for kind, gradient in gradients.items():
        torch.testing.assert_close(half_gradients[kind], gradient / 2, rtol=1e-4, atol=1e-7)


def test_the_teacher_gets_no_gradient(loss):
    student, teacher, targets, weights = _batch(loss)
    teacher = {kind: tensor.requires_grad_() for kind, tensor in teacher.items()}
    _run(loss, student, teacher, targets, weights)
    assert all(tensor.grad is None for tensor in teacher.values())
