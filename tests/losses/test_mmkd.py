"""Learnt weights: the published network and loss, the meta step against differences, Adam."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.kd import kd_loss
from fedkd.losses.mmkd import feature_shares, logit_shares, mmkd_feature_loss, mmkd_loss
from tests.golden.published import published

GOLDEN = published("multi_teacher")
_double, _inputs = GOLDEN.double, GOLDEN.answers


def _network():
    return [_double(name).requires_grad_() for name in ("mmkd_w1", "mmkd_b1", "mmkd_w2", "mmkd_b2")]


def test_logit_shares_are_those_of_the_published_network():
    student, teachers = _inputs()
    w1, b1, w2, b2 = network = _network()
    seen = torch.cat([*teachers, student], dim=1)
    expected = (((seen @ w1.T + b1).clamp(min=0)) @ w2.T + b2).softmax(dim=1)
    shares = logit_shares(student, teachers, *network)
    torch.testing.assert_close(shares, expected.T, rtol=1e-12, atol=1e-14)
    assert torch.autograd.grad(shares[0].sum(), student, allow_unused=True)[0] is None


def test_feature_shares_see_inner_products_of_samples():
    maps = [_double(f"mt_feat_t{k}") for k in (1, 2, 3)] + [_double("mt_feat_s1")]
    rows = torch.cat([torch.einsum("icyx,jcyx->ij", m, m) for m in maps], dim=1)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    shares = feature_shares(maps[3], maps[:3], *layers.parameters())
    torch.testing.assert_close(shares, layers(rows).softmax(dim=1).T)
    value = mmkd_feature_loss([maps[3]] * 3, maps[:3], shares)
    squares = torch.stack([((maps[3] - m) ** 2).mean(dim=(1, 2, 3)) for m in maps[:3]])
    torch.testing.assert_close(value, (shares * squares).sum(dim=0))


def test_mmkd_is_kd_weighted_by_shares_on_both_paths():
    student, teachers = _inputs()
    shares = logit_shares(student, teachers, *_network())
    terms = torch.stack([kd_loss(student, teacher) for teacher in teachers])
    expected = (shares * terms).sum(dim=0)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), student, retain_graph=True)
    for known in (shares, shares.detach()):
        value = mmkd_loss(student, teachers, known)
        (gradient,) = torch.autograd.grad(value.mean(), student, retain_graph=True)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


def test_mmkd_differentiates_twice_by_student_and_shares():
    student, teachers = _inputs()
    shares = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64) + 0.1
    assert torch.autograd.gradgradcheck(
        lambda z, w: mmkd_loss(z, teachers, w, weights=weights, temperature=2.0), (student, shares)
    )


# -- the meta step ------------------------------------------------------------------------------


def _setting(count=2, classes=3, size=8, dtype=torch.float64, student=None, **options):
    """A fitted loss, a student, and a batch on which all teachers know the answer but the last."""
    torch.manual_seed(0)
    images = torch.randn(size, 4, dtype=dtype)
    targets = torch.randint(classes, (size,))
    student = student or nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)).to(dtype)
    right = 6 * F.one_hot(targets, classes).to(dtype)
    teachers = torch.stack([right + torch.randn(size, classes, dtype=dtype) for _ in range(count)])
    teachers[-1] = right.roll(1, dims=1)
    ensemble = Ensemble(
        tuple(map(Teacher, range(count))),
        {Logits(): teachers},
        torch.full((count, size), 1 / count, dtype=dtype),
    )
    readings = {Logits(): student(images)}
    each = [ensemble.teacher(m) for m in range(count)]
    loss = LOSSES.create("mmkd", temperature=2.0, **options).adapted(readings, each).to(dtype)

    def forward(parameters):
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        return {Logits(): functional_call(student, {**parameters, **buffers}, (images,))}

    return loss, student, (forward, dict(student.named_parameters()), ensemble, targets)


def _gradient_of(loss, *arguments, **options):
    """The gradient that a meta step hands to Adam."""
    seen = []
    loss._adam = seen.append
    loss.meta_step(*arguments, **options)
    del loss._adam
    return seen[0]


def test_the_meta_gradient_is_that_of_the_error_three_steps_on():
    loss, student, step = _setting()
    forward, _, ensemble, targets = step
    lr = 0.3
    seen = []  # what the network is shown, which as published is no way for gradients

    def error_after_three_steps(moved):
        """Plain gradient descent, without a graph through the steps."""
        probe = [part.detach() for part in moved]
        here = {n: p.detach().clone() for n, p in student.named_parameters()}
        for number in range(3):
            leaves = {n: p.requires_grad_() for n, p in here.items()}
            logits = forward(leaves)[Logits()]
            if number < 2:
                if len(seen) < 2:
                    seen.append(logits.detach())
                shares = logit_shares(seen[number], ensemble.logits, *probe)
                terms = [kd_loss(logits, t, temperature=2.0) for t in ensemble.logits]
                value = (shares * torch.stack(terms)).sum(dim=0).mean()
            else:
                value = F.cross_entropy(logits, targets)
            slopes = torch.autograd.grad(value, list(leaves.values()))
            here = {n: (p - lr * g).detach() for (n, p), g in zip(leaves.items(), slopes)}
        return F.cross_entropy(forward(here)[Logits()], targets).item()

    network = list(loss.network.parameters())
    error_after_three_steps(network)
    gradient = _gradient_of(loss, *step, lr=lr)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in network]
        width = 1e-5
        ends = [
            error_after_three_steps([p + sign * width * a for p, a in zip(network, along)])
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * width)
        found = float(gradient @ torch.cat([a.flatten() for a in along]))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_meta_steps_find_the_teacher_who_is_right_and_leave_the_student_alone():
    loss, student, step = _setting(dtype=torch.float32, meta_lr=0.01)
    forward, own, ensemble, _ = step
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def share():
        with torch.no_grad():
            logits = forward(own)[Logits()]
            shares = logit_shares(logits, ensemble.logits, *loss.network.parameters())
            return float(shares[0].mean())

    start = share()
    for _ in range(40):
        end = loss.meta_step(*step, lr=0.3)
    assert share() > max(0.9, start)
    assert end.ndim == 0
    assert not end.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def test_the_network_does_not_learn_from_the_loss_itself():
    loss, student, step = _setting()
    forward, own, ensemble, targets = step
    loss(forward(own), ensemble, targets).mean().backward()
    assert not any(p.requires_grad or p.grad is not None for p in loss.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_it_moves_as_torch_adam_would_also_after_a_break():
    loss, *_ = _setting(meta_weight_decay=0.1)
    model = [p.detach().clone().requires_grad_() for p in loss.network.parameters()]
    adam = torch.optim.Adam(model, lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model]
        for p, gradient in zip(model, gradients):
            p.grad = gradient
        adam.step()
        loss._adam(torch.cat([gradient.flatten() for gradient in gradients]))
        if number == 2:
            state = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
            loss, *_ = _setting(meta_weight_decay=0.1)
            loss.load_state_dict(state)
    for ours, theirs in zip(loss.network.parameters(), model):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)


def test_a_step_that_is_not_finite_is_left_out():
    loss, _, step = _setting(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    loss.meta_step(*step, lr=1e38)
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())


class _Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images):
        tokens = self.embed(images[..., None])
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1))


@pytest.mark.parametrize(
    "student",
    [
        nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4),
            nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3),
        ),
        _Attentive(),
    ],
    ids=["batch norm", "attention"],
)  # fmt: skip
def test_layers_of_usual_networks_can_be_differentiated_through(student):
    loss, student, step = _setting(dtype=torch.float32, student=student)
    gradient = _gradient_of(loss, *step, lr=0.1)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_frozen_parts_and_half_precision_readings():
    loss, student, (forward, _, *known) = _setting(dtype=torch.float32)
    some = {"2.weight": student[2].weight}
    rest = {n: p.detach() for n, p in student.named_parameters() if n not in some}

    def half(moved):
        return {k: v.bfloat16() for k, v in forward({**rest, **moved}).items()}

    gradient = _gradient_of(loss, half, some, *known, lr=0.1)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_the_width_may_be_chosen():
    loss, *_ = _setting(count=3, classes=3)
    assert [p.shape for p in loss.network.parameters()] == [(6, 12), (6,), (3, 6), (3,)]
    loss, *_ = _setting(count=3, classes=3, hidden=4)
    assert [p.shape for p in loss.network.parameters()] == [(4, 12), (4,), (3, 4), (3,)]
