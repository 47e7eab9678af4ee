"""Decoupled distillation: official numbers, the identity, and where the official code breaks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import TeacherWeights
from fedkd.losses.ce import ce_loss
from fedkd.losses.dkd import dkd_loss
from fedkd.losses.kd import kd_loss
from tests.golden.published import published, repeats

GOLDEN = published("output_relational")
_double = GOLDEN.double
INPUTS = GOLDEN["inputs"]
CASES = {case["name"]: case for case in GOLDEN["official"] if case["name"].startswith("dkd")}
EDGE_CASES = GOLDEN["dkd_edge_cases"]["cases"]


def _loss(student, teacher, targets, alpha=1.0, beta=8.0, temperature=4.0):
    return dkd_loss(student, teacher, targets, alpha=alpha, beta=beta, temperature=temperature)


@pytest.mark.parametrize("name", CASES)
def test_dkd_repeats_the_official_code(name):
    case, targets = CASES[name], torch.tensor(INPUTS["targets"])
    options = case["hyperparameters"]
    logits = _double("logits_s").requires_grad_()
    value = _loss(
        logits, _double("logits_t"), targets, options["alpha"], options["beta"], options["T"]
    ).mean()
    if "epoch" in options:
        warm = min(options["epoch"] / options["WARMUP"], 1.0)
        value = options["CE_WEIGHT"] * ce_loss(logits, targets).mean() + warm * value
    repeats(case, value, logits)


@pytest.mark.parametrize("case", EDGE_CASES, ids=lambda case: case["why"][:30])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_exact_where_the_official_code_is_not(case, dtype, rel):
    student = torch.tensor(case["logits_s"], dtype=dtype, requires_grad=True)
    teacher, targets = torch.tensor(case["logits_t"], dtype=dtype), torch.tensor(case["targets"])
    expected = case["stable_expected_float64"]
    for key, alpha, beta in [
        ("total", case["alpha"], case["beta"]),
        ("tckd", 1, 0),
        ("nckd", 0, 1),
    ]:
        value = _loss(student, teacher, targets, alpha, beta, case["T"])
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert value.item() == pytest.approx(expected[key], rel=rel, abs=1e-30)
        assert gradient.isfinite().all()
        assert gradient.sum().abs() < 1e-5 * gradient.abs().max().clamp(min=1)


def test_standardised_dkd_is_dkd_of_z_scores():
    """As in the published code for standardised logits."""
    student, teacher = _double("logits_s").requires_grad_(), _double("logits_t")
    targets = torch.tensor(INPUTS["targets"])
    value = dkd_loss(student, teacher, targets, beta=2.0, standardise=True).sum()

    def z_score(logits):
        mean, std = logits.mean(dim=1, keepdim=True), logits.std(dim=1, keepdim=True)
        return (logits - mean) / (1e-7 + std)

    literal = dkd_loss(z_score(student), z_score(teacher), targets, beta=2.0).sum()
    torch.testing.assert_close(value, literal, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(v, student)[0] for v in (value, literal)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    options = LOSSES.create("dkd", beta=2.0, standardise=True)
    logits = Logits()
    loss = options({logits: student}, {logits: teacher}, targets, TeacherWeights(torch.ones(8)))
    torch.testing.assert_close(loss.sum(), value)


def test_two_classes_have_no_non_target_part():
    student = torch.tensor([[0.3, -1.7], [100.1, 3.3]], requires_grad=True)
    value = _loss(student, torch.tensor([[2.2, 0.1], [-5.7, 1.1]]), torch.tensor([0, 1]), alpha=0)
    value.sum().backward()
    assert (value == 0).all()
    assert (student.grad == 0).all()


batches = st.tuples(
    st.integers(1, 6), st.integers(2, 9), st.integers(0, 10**6), st.floats(0.1, 30.0)
)


def _draw(batch):
    size, classes, seed, scale = batch
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, size, classes, generator=generator, dtype=torch.float64)
    return *logits, torch.randint(classes, (size,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(batches, st.sampled_from([1.0, 4.0]))
def test_tckd_and_nckd_add_up_to_kl(batch, temperature):
    student, teacher, targets = _draw(batch)
    tckd = _loss(student, teacher, targets, 1, 0, temperature)
    nckd = _loss(student, teacher, targets, 0, 1, temperature)
    log_b = torch.log_softmax(teacher / temperature, dim=1).gather(1, targets[:, None])[:, 0]
    kl = kd_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(tckd - torch.expm1(log_b) * nckd, kl, rtol=1e-8, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(batches, st.floats(-50, 50))
def test_a_constant_per_row_changes_nothing(batch, shift):
    student, teacher, targets = _draw(batch)
    plain = _loss(student, teacher, targets)
    torch.testing.assert_close(_loss(student + shift, teacher - shift, targets), plain)


@settings(max_examples=40, deadline=None)
@given(batches, st.floats(-20, 20))
def test_nckd_does_not_see_the_target_logit(batch, shift):
    student, teacher, targets = _draw(batch)
    moved = student.scatter_add(1, targets[:, None], torch.full_like(student[:, :1], shift))
    torch.testing.assert_close(
        _loss(moved, teacher, targets, alpha=0), _loss(student, teacher, targets, alpha=0)
    )
