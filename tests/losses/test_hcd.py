"""Heterogeneous complementary distillation: the formulas, what trains what, edges."""

import numpy as np
import pytest
import torch

from fedkd.knowledge.kinds import Logits, Pooled, Stage
from fedkd.losses.base import TeacherWeights
from fedkd.losses.hcd import HCDLoss, hcd_loss, orthogonality_loss, sub_logits
from fedkd.losses.kd import kd_loss
from tests.golden.published import published

GOLDEN = published("features")
_double = GOLDEN.double
CASE = GOLDEN["derived"]["hcd_losses_reconstruction"]
NOTHING = {"kd_weight": 0.0, "ce_weight": 0.0, "sub_weight": 0.0, "orthogonality": 0.0}


def _inputs():
    targets = torch.tensor(GOLDEN["inputs"]["targets"])
    return _double("logits_s"), _double("logits_t"), targets, _double("hcd_sub")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("sub_weight", CASE["sdd_kl"]),
        ("ce_weight", CASE["sub_ce"]),
        ("orthogonality", CASE["orthogonality"]),
    ],
)
def test_each_part_repeats_the_reconstruction(part, expected):
    student, teacher, targets, sub = _inputs()
    options = {**NOTHING, part: 1.0}
    loss = hcd_loss(student, teacher, targets, [sub], label_smoothing=0.0, **options)
    assert loss.shape == (4,)
    assert loss.mean().item() == pytest.approx(expected, rel=1e-12)


def test_hcd_equals_numpy():
    student, teacher, targets, sub = _inputs()
    options = {"temperature": 2.0, "student_share": 0.7, "teacher_share": 0.4, "threshold": 0.2}
    options["sub_weight"] = 3.0
    value = hcd_loss(student, teacher, targets, [sub, -sub], **options)

    def log_softmax(z):
        z = z - z.max(axis=-1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

    def kl(a, b):
        a, b = log_softmax(a / 2), log_softmax(b / 2)
        return 4 * (np.exp(a) * (a - b)).sum(axis=-1)

    zs, zt, y = student.numpy(), teacher.numpy(), targets.numpy()
    expected = kl(zt, zs)
    for stage in (sub.numpy(), -sub.numpy()):
        for b in range(4):
            heads = 0.7 * stage[b] + 0.4 * zt[b]
            logs = log_softmax(heads)
            smoothed = -0.9 * logs[:, y[b]] - 0.1 * logs.mean(axis=1)
            others = heads.copy()
            others[:, y[b]] = 0
            others /= np.linalg.norm(others, axis=1, keepdims=True)
            cosines = others @ others.T
            overlap = [
                max(cosines[i, j] - 0.2, 0) ** 2 for i in range(3) for j in range(3) if i != j
            ]
            parts = smoothed.mean() + 3 * kl(heads, zs[b]).mean() + np.mean(overlap)
            expected[b] += parts / 2  # the mean over two stages
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def test_a_sum_over_stages_is_as_many_times_the_mean():
    student, teacher, targets, sub = _inputs()
    stages = [sub, -sub, 2 * sub]
    kd = kd_loss(student, teacher, temperature=1.0)
    mean = hcd_loss(student, teacher, targets, stages) - kd
    total = hcd_loss(student, teacher, targets, stages, over_stages="sum") - kd
    torch.testing.assert_close(total, 3 * mean)


def test_detached_sub_logits_teach_the_student_and_are_taught_by_the_targets():
    student, teacher, targets, sub = _inputs()
    student.requires_grad_()
    sub.requires_grad_()

    def gradients(**options):
        loss = hcd_loss(student, teacher, targets, [sub], **{**NOTHING, **options})
        return torch.autograd.grad(loss.sum(), (student, sub), materialize_grads=True)

    of_student, of_sub = gradients(sub_weight=6.0)
    assert of_student.abs().max() > 0
    assert (of_sub == 0).all()
    published_student, published_sub = gradients(sub_weight=6.0, detach=False)
    torch.testing.assert_close(published_student, of_student)
    assert published_sub.abs().max() > 0
    for part in ("ce_weight", "orthogonality"):
        of_student, of_sub = gradients(**{part: 1.0})
        assert (of_student == 0).all()
        assert of_sub.abs().max() > 0


@pytest.mark.parametrize(
    "options", [{}, {"detach": False, "orthogonal": "sub", "temperature": 3.0}]
)
def test_hcd_gradcheck(options):
    student, teacher, targets, sub = _inputs()
    student.requires_grad_()
    sub.requires_grad_(not options.get("detach", True))
    assert torch.autograd.gradcheck(
        lambda z: hcd_loss(z, teacher, targets, [sub], **options), (student,)
    )
    if options:
        assert torch.autograd.gradcheck(
            lambda u: hcd_loss(student, teacher, targets, [u], **options), (sub,)
        )


def test_orthogonal_sub_logits_cost_nothing_and_equal_ones_most():
    targets = torch.tensor([0])
    apart = torch.tensor([[[9.0, 1, 0, 0], [9, 0, 1, 0], [9, 0, 0, 1]]])
    assert orthogonality_loss(apart, targets) == 0  # the target's entry does not count
    same = torch.ones(1, 3, 4)
    torch.testing.assert_close(orthogonality_loss(same, targets), torch.tensor([0.25]))
    torch.testing.assert_close(
        orthogonality_loss(same, targets, threshold=0.0), torch.tensor([1.0])
    )
    # As in an early port: a huge entry makes all vectors alike, whatever they hold.
    torch.testing.assert_close(
        orthogonality_loss(apart, targets, label_entry=-1e6), torch.tensor([0.25])
    )


@pytest.mark.parametrize("orthogonal", ["fused", "sub"])
def test_the_penalty_looks_at_fused_or_bare_sub_logits(orthogonal):
    student, teacher, targets, sub = _inputs()
    options = {**NOTHING, "orthogonality": 1.0, "orthogonal": orthogonal}
    value = hcd_loss(student, teacher, targets, [sub], **options)
    seen = sub_logits(sub, teacher) if orthogonal == "fused" else sub
    torch.testing.assert_close(value, orthogonality_loss(seen, targets))


def test_one_sub_logit_has_nothing_to_be_orthogonal_to():
    student, teacher, targets, sub = _inputs()
    sub = sub[:, :1].requires_grad_()
    loss = hcd_loss(student, teacher, targets, [sub], **{**NOTHING, "orthogonality": 1.0})
    loss.sum().backward()
    assert (loss == 0).all()
    assert (sub.grad == 0).all()


def test_order_of_samples_heads_and_classes_does_not_matter():
    student, teacher, targets, sub = _inputs()
    rows, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 0, 2, 4, 3])
    loss = hcd_loss(student, teacher, targets, [sub])
    moved = hcd_loss(
        student[rows][:, columns],
        teacher[rows][:, columns],
        columns.argsort()[targets[rows]],
        [sub[rows][:, [1, 2, 0]][:, :, columns]],
    )
    torch.testing.assert_close(moved, loss[rows])


def _batch(size=4, sides=(8, 4, 2)):
    torch.manual_seed(0)
    student = {Logits(): torch.randn(size, 5)}
    for index, width, side in zip((-3, -2, -1), (3, 4, 6), sides):
        student[Stage(index)] = torch.randn(size, width, side, side)
    return student, {Logits(): torch.randn(size, 5), Pooled(): torch.randn(size, 7)}


@pytest.mark.parametrize("sides", [(8, 4, 2), (4, 4, 4), (7, 7, 3), (2, 1, 1)])
def test_the_adapted_loss_fits_any_stages(sides):
    student, teacher = _batch(sides=sides)
    targets = torch.tensor([0, 1, 2, 3])
    ready = HCDLoss(sub_heads=3).adapted(student, teacher)
    maps = [projector(student[kind]) for kind, projector in zip(ready.stages, ready.projectors)]
    assert [m.shape for m in maps] == [(4, 7)] * 3  # the wider of 6 and 7
    student = {kind: tensor.requires_grad_() for kind, tensor in student.items()}
    value = ready(student, teacher, targets, TeacherWeights(torch.ones(4)))
    assert value.shape == (4,)
    value.sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in student.values())
    assert all(p.grad is not None for p in ready.parameters())


def test_deeper_stages_have_fewer_blocks():
    student, teacher = _batch()
    ready = HCDLoss().adapted(student, teacher)
    strides = [
        sum(getattr(layer, "stride", 1) == (2, 2) for layer in projector)
        for projector in ready.projectors
    ]
    assert strides == [2, 1, 0]
    assert ready.mappers[0][0].in_features == 7 + 7
    assert ready.mappers[0][2].out_features == 4 * 5
