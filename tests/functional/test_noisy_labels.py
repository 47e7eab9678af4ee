"""Forgetting and label cleaning: official numbers, edges."""

import pytest
import torch
from torch.nn import functional as F

from fedkd.functional.noisy_labels import (
    balance_penalty,
    clean_probability,
    confidence_penalty,
    forget_loss,
    guess_loss,
    guess_weight,
    guessed_labels,
    refined_labels,
    rescaled,
    select_for_unlearning,
    sharpened,
    soft_cross_entropy,
)
from tests.golden.published import published

GOLDEN = published("multi_teacher")
_double = GOLDEN.double
OFFICIAL = GOLDEN["official"]


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_forget_loss_is_minus_the_official_distillation(temperature):
    case = OFFICIAL[f"acdu_distill_kl_T{temperature}"]
    student = _double("logits_s").requires_grad_()
    value = forget_loss(student, _double("logits_t"), temperature=temperature)
    (gradient,) = torch.autograd.grad(value.mean(), student)
    assert value.shape == (4,)
    assert -value.mean().item() == pytest.approx(case["value"], rel=1e-12)
    expected = torch.tensor(case["grad"], dtype=torch.float64)
    torch.testing.assert_close(-gradient, expected, rtol=1e-9, atol=1e-15)


def test_a_student_that_equals_its_snapshot_has_no_reason_to_forget():
    student = _double("logits_s").requires_grad_()
    value = forget_loss(student, student.detach())
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-12


def test_descent_on_forget_loss_leaves_the_snapshot():
    student = _double("logits_s").requires_grad_()
    snapshot = student.detach() + 0.01
    snapshot[:, 0] += 0.1
    before = forget_loss(student, snapshot, temperature=1.0).sum()
    (gradient,) = torch.autograd.grad(before, student)
    after = forget_loss(student - gradient, snapshot, temperature=1.0).sum()
    assert after < before <= 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5)])
def test_saturated_predictions_are_finite(dtype, shape):
    student = (1e4 * torch.randn(shape).sign()).to(dtype).requires_grad_()
    snapshot = (1e4 * torch.randn(shape).sign()).to(dtype)
    for value in (
        forget_loss(student, snapshot).sum(),
        balance_penalty(student),
        confidence_penalty(student).sum(),
        guess_loss(student, torch.full(shape, 1 / shape[1])).sum(),
        soft_cross_entropy(student, torch.full(shape, 1 / shape[1])).sum(),
    ):
        (gradient,) = torch.autograd.grad(value, student)
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("drop", [0.2, 0.05])
def test_selection_repeats_the_official_code(drop):
    chosen = select_for_unlearning(
        _double("acd_losses"), _double("acd_noisy"), _double("acd_clip"), current=0.05, drop=drop
    )
    assert chosen.int().tolist() == OFFICIAL[f"acdu_selection_cur0.05_diff{drop}"]["value"]


def test_reasons_to_forget_can_be_left_out():
    losses = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.5], [0.5, 0.1, 0.3, 0.6, 0.7]])
    labels, reference = torch.zeros(5), torch.tensor([1, 1, 1, 1, 0])

    def chosen(reference, **options):
        return select_for_unlearning(losses, labels, reference, period=1, **options).tolist()

    assert chosen(reference, current=0.25, drop=None) == [False, True, False, False, False]
    # The first two fell by as much.
    assert chosen(reference, current=None, drop=0.5) == [True, True, False, False, False]
    assert chosen(reference, current=None, drop=None) == [False] * 5
    assert chosen(None, current=None, drop=0.9) == [True, True, True, True, False]
    assert chosen(1 - reference, current=None, drop=0.5) == [False] * 5


def test_selection_needs_a_history():
    with pytest.raises(ValueError, match="losses 10 epochs apart, got 10"):
        select_for_unlearning(torch.zeros(10, 4), torch.zeros(4), torch.ones(4))


def test_rescaled_runs_from_zero_to_one():
    expected = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
    losses = torch.tensor([[1.0, 2.0, 3.0], [7.0, 7.0, 7.0]])
    torch.testing.assert_close(rescaled(losses), expected)


@pytest.mark.parametrize("number", range(4))
def test_clean_probability_repeats_the_gaussian_mixture(number):
    case = dict(GOLDEN["gaussian_mixture"]["cases"][number])
    losses, expected = (torch.tensor(case.pop(k)).double() for k in ("losses", "probability"))
    torch.testing.assert_close(clean_probability(losses, **case), expected, rtol=1e-6, atol=1e-9)


def test_low_losses_are_clean_whatever_the_order():
    losses = torch.cat([torch.linspace(0, 0.1, 20), torch.linspace(0.8, 1, 7)])
    clean = clean_probability(losses)
    assert (clean[:20] > 0.99).all()
    assert (clean[20:] < 0.01).all()
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(clean_probability(losses[order]), clean[order])


def test_several_epochs_are_averaged():
    history = torch.rand(7, 30, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(
        clean_probability(history, average=5), clean_probability(history[-5:].mean(dim=0))
    )
    torch.testing.assert_close(clean_probability(history), clean_probability(history[-1]))


@pytest.mark.parametrize("losses", [torch.zeros(4), torch.full((1,), 0.3), torch.ones(3, 5)])
def test_equal_losses_are_all_clean(losses):
    assert (clean_probability(losses) == 1).all()


def test_two_samples_and_sharp_groups_are_finite():
    assert clean_probability(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1, 0])
    assert clean_probability(torch.tensor([0.0] * 50 + [1.0])).isfinite().all()


def test_sharpened_squares_and_normalises():
    p = torch.tensor([[0.8, 0.2, 0.0], [1.0, 0.0, 0.0]])
    expected = p**2 / (p**2).sum(dim=1, keepdim=True)
    torch.testing.assert_close(sharpened(p), expected)
    torch.testing.assert_close(sharpened(p, temperature=1.0), p)


def test_refined_labels_trust_a_label_as_far_as_it_is_clean():
    views = [_double("logits_s").requires_grad_(), _double("logits_t")]
    labels = torch.tensor([0, 1, 2, 3])
    own = (views[0].softmax(dim=1) + views[1].softmax(dim=1)) / 2
    sure = refined_labels(labels, torch.ones(4), views)
    torch.testing.assert_close(sure, F.one_hot(labels, 6).double())
    unsure = refined_labels(labels, torch.zeros(4), views)
    torch.testing.assert_close(unsure, guessed_labels(views))
    torch.testing.assert_close(unsure, sharpened(own.detach()))
    half = refined_labels(labels, torch.full((4,), 0.5), views, temperature=1.0)
    torch.testing.assert_close(half, (own + F.one_hot(labels, 6)).detach() / 2)
    assert not half.requires_grad


def test_both_parts_of_the_semi_supervised_loss_are_as_published():
    logits, targets = _double("logits_s"), _double("logits_t").softmax(dim=1)
    labelled = -(logits.log_softmax(dim=1) * targets).sum(dim=1).mean()
    guessed = ((logits.softmax(dim=1) - targets) ** 2).mean()
    torch.testing.assert_close(soft_cross_entropy(logits, targets).mean(), labelled)
    torch.testing.assert_close(guess_loss(logits, targets).mean(), guessed)
    values = [guess_weight(e, warmup=10) for e in (0, 10, 18, 26, 99)]
    assert values == [0, 0, 12.5, 25, 25]


def test_penalties_are_as_published_and_least_where_they_should():
    logits = _double("logits_s")
    p = logits.softmax(dim=1)
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(
        balance_penalty(logits), (uniform * (uniform / p.mean(dim=0)).log()).sum()
    )
    torch.testing.assert_close(confidence_penalty(logits), (p * p.log()).sum(dim=1))
    assert balance_penalty(4 * torch.eye(5)).item() == pytest.approx(0, abs=1e-6)
