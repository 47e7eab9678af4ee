"""Cross entropy and Hinton's distillation."""

import pytest
import torch
from torch.nn import functional as F

from fedkd.losses.ce import ce_loss
from fedkd.losses.kd import kd_loss, standardised
from tests.golden.published import published, repeats

GOLDEN = published("output_relational")
_double = GOLDEN.double
INPUTS = GOLDEN["inputs"]
CASES = {case["name"]: case for case in GOLDEN["official"] if case["name"].startswith("kd_")}
TOTALS = {"kd_total_cifar"}


def test_every_official_case_belongs_to_a_loss():
    owners = {case["name"].split("_")[0] for case in GOLDEN["official"]}
    assert owners == {"kd", "dkd", "dist", "rkd"}


@pytest.mark.parametrize("name", sorted(set(CASES) - TOTALS))
def test_kd_repeats_the_official_code(name):
    logits = _double("logits_s").requires_grad_()
    options = {"temperature": CASES[name]["hyperparameters"]["T"]}
    options["standardise"] = name == "kd_logitstd_T2"
    value = kd_loss(logits, _double("logits_t"), **options).mean()
    repeats(CASES[name], value, logits)


def test_ce_and_kd_add_up_to_the_official_total():
    logits = _double("logits_s").requires_grad_()
    ce = ce_loss(logits, torch.tensor(INPUTS["targets"])).mean()
    kd = kd_loss(logits, _double("logits_t"), temperature=4.0).mean()
    repeats(CASES["kd_total_cifar"], 0.1 * ce + 0.9 * kd, logits)


def test_standardised_kd_sees_neither_shift_nor_range():
    student, teacher = _double("logits_s"), _double("logits_t")
    plain = kd_loss(student, teacher, temperature=2.0, standardise=True)
    moved = kd_loss(3 * student + 5, 0.2 * teacher - 1, temperature=2.0, standardise=True)
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-6)  # eps 1e-7 is part of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardised_logits_are_the_published_z_scores(dtype):
    logits = _double("logits_s").to(dtype).requires_grad_()
    scores = standardised(logits)
    published = (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)
    torch.testing.assert_close(scores, published)
    found = [torch.autograd.grad((z * z**2).sum(), logits)[0] for z in (scores, published)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert (standardised(torch.ones(3, 1)) == 0).all()


def test_logits_of_a_map_are_compared_along_the_last_axis():
    student, teacher = _double("logits_s").view(2, 4, 10), _double("logits_t").view(2, 4, 10)
    flat = kd_loss(student.flatten(0, 1), teacher.flatten(0, 1))
    torch.testing.assert_close(kd_loss(student, teacher), flat.view(2, 4))


def test_equal_logits_have_no_direction():
    logits = torch.full((2, 4), 3.0, requires_grad=True)
    value = standardised(logits)
    value[:, 0].sum().backward()
    assert (value == 0).all()
    assert (logits.grad == 0).all()


def test_label_smoothing_mixes_in_the_uniform_distribution():
    logits, targets = _double("logits_s"), torch.tensor(INPUTS["targets"])
    log_p = F.log_softmax(logits, dim=1)
    expected = 0.9 * -log_p[torch.arange(8), targets] - 0.1 * log_p.mean(dim=1)
    torch.testing.assert_close(ce_loss(logits, targets, label_smoothing=0.1), expected)
