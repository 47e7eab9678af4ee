"""What every registered loss keeps, whoever wrote it."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, EnsembleLoss, Trust
from fedkd.models.build import build_model
from fedkd.models.network import Network

NAMES = LOSSES.names()
SINGLE = [name for name in NAMES if isinstance(LOSSES.create(name), DistillationLoss)]
TOGETHER = [name for name in NAMES if name not in SINGLE]
# Losses that are not least when the student repeats the teacher.
NOT_ZERO_AT_IDENTITY = {"ce", "wkd_l"}

Loss = DistillationLoss | EnsembleLoss
Batch = tuple[dict[Kind, Tensor], dict[Kind, Tensor], Tensor, Tensor]


@cache
def _network(width: int, classes: int) -> Network:
    return build_model(
        "cnn_small", num_classes=classes, in_channels=1, image_size=16, mean=[0.5], std=[0.2],
        seed=width, options={"width": width, "norm": "batch"},
    )  # fmt: skip


def _batch(loss: Loss, size: int = 6, classes: int = 5, seed: int = 0) -> Batch:
    """Student, teacher, targets and weights of a made-up batch, read from two small networks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 1, 16, 16), generator=generator, dtype=torch.uint8)

    def read(width: int, kinds: tuple[Kind, ...]) -> dict[Kind, Tensor]:
        network = _network(width, classes)
        return extract(network, images, kinds, views=lambda _number: images.flip(3))

    targets = torch.randint(classes, (size,), generator=generator)
    weights = torch.rand(size, generator=generator)
    return read(4, loss.reads), read(8, loss.needs), targets, weights


def _adapted(loss: Loss, student: dict[Kind, Tensor], *teachers: dict[Kind, Tensor]) -> Loss:
    """The loss fitted to these shapes, with the same parameters each time."""
    torch.manual_seed(0)
    if isinstance(loss, EnsembleLoss):
        loss = loss.adapted(student, teachers)
    elif loss.needs:
        loss = loss.adapted(student, teachers[0])
    # Batch norm cannot train on a single number per channel, and training never shows it one.
    return loss.train(len(next(iter(student.values()))) > 1)


def _call(
    loss: Loss,
    student: dict[Kind, Tensor],
    teacher: dict[Kind, Tensor],
    targets: Tensor,
    weights: Tensor,
) -> Tensor:
    seen = targets if loss.needs_targets else None
    if isinstance(loss, EnsembleLoss):
        alone = {kind: tensor[None] for kind, tensor in teacher.items()}
        ensemble = Ensemble((Teacher(0),), alone, torch.ones(1, len(targets)))
        return loss(student, ensemble, seen)
    value: Tensor = loss(student, teacher, seen, Trust(weights))
    return value


def _run(
    loss: Loss,
    student: dict[Kind, Tensor],
    teacher: dict[Kind, Tensor],
    targets: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, dict[Kind, Tensor]]:
    """Raw value, what the objective makes of it, and the gradients."""
    loss = _adapted(loss, student, teacher)
    student = {kind: tensor.clone().requires_grad_() for kind, tensor in student.items()}
    value = _call(loss, student, teacher, targets, weights)
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


def _each(tensors: dict[Kind, Tensor], change: Callable[[Tensor], Tensor]) -> dict[Kind, Tensor]:
    """`change` applied to what is said of samples; facts stay."""
    return {kind: change(t) if kind.per_sample else t for kind, t in tensors.items()}


@pytest.fixture(params=NAMES)
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES.create(request.param)


def test_value_is_one_number_per_sample_or_one_in_all(loss):
    value, _, gradients = _run(loss, *_batch(loss))
    assert value.shape in {(6,), ()}
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_ZERO_AT_IDENTITY])
def test_a_student_that_repeats_the_teacher_has_no_loss(name):
    loss = LOSSES.create(name)
    if loss.reads != tuple(kind for kind in loss.needs if kind.per_sample):
        pytest.skip("projects first")
    _, teacher, targets, weights = _batch(loss)
    if any(True for _ in _adapted(loss, teacher, teacher).parameters()):
        pytest.skip("projects first")
    _, reduced, gradients = _run(loss, teacher, teacher, targets, weights)
    assert abs(reduced) < 1e-4
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients.values())


def test_order_of_samples_does_not_matter(loss):
    student, teacher, targets, weights = _batch(loss)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    value, reduced, gradients = _run(loss, student, teacher, targets, weights)
    moved, moved_reduced, moved_gradients = _run(
        loss,
        _each(student, lambda t: t[order]),
        _each(teacher, lambda t: t[order]),
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
    student = _each(student, lambda t: t.to(dtype))
    teacher = _each(teacher, lambda t: t.to(dtype))
    _, reduced, gradients = _run(loss, student, teacher, targets, weights)
    _, expected, expected_gradients = _run(
        loss,
        _each(student, lambda t: t.float()),
        _each(teacher, lambda t: t.float()),
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
        student = _each(student, lambda t: 1e4 * t.sign())
    if sure != "student":
        teacher = _each(teacher, lambda t: 1e4 * t.sign())
    _run(
        loss,
        _each(student, lambda t: t.to(dtype)),
        _each(teacher, lambda t: t.to(dtype)),
        targets,
        weights,
    )


def test_a_student_that_says_nothing_yet_is_finite(loss):
    student, teacher, targets, weights = _batch(loss)
    student = _each(student, torch.zeros_like)
    _, _, gradients = _run(loss, student, teacher, targets, weights)
    assert all(gradient.abs().max() < 1e3 for gradient in gradients.values())


@pytest.mark.parametrize("name", SINGLE)
def test_a_teacher_without_weight_has_no_say(name):
    loss = LOSSES.create(name)
    student, teacher, targets, weights = _batch(loss)
    _, reduced, gradients = _run(loss, student, teacher, targets, torch.zeros_like(weights))
    assert reduced == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("name", SINGLE)
def test_half_the_weight_is_half_the_loss(name):
    loss = LOSSES.create(name)
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


def _together(
    loss: Loss, order: list[int], seeds: tuple[int, ...] = (0, 1, 2), **options: Tensor
) -> Tensor:
    """Gradient on the student's side for three teachers in some order."""
    student, _, targets, _ = _batch(loss)
    told = [_batch(loss, seed=seed)[1] for seed in seeds]
    teachers = [told[number] for number in order]
    loss = _adapted(loss, student, *teachers)
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
def test_a_teacher_that_fusion_silenced_has_no_say(name):
    loss = LOSSES.create(name)
    weights = torch.tensor([[0.5], [0.0], [0.5]]).expand(3, 6)
    silenced = _together(loss, [0, 1, 2], weights=weights)
    other = _together(loss, [0, 1, 2], (0, 7, 2), weights=weights)
    torch.testing.assert_close(silenced, other)
    assert not torch.equal(_together(loss, [0, 1, 2], (5, 6, 7)), silenced)
