"""Wasserstein distillation of logits: published values, and where it knows no gradient."""

import pytest
import torch
from torch.nn import functional as F

from fedkd.knowledge.kinds import ClassCosts, Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import TeacherWeights
from fedkd.losses.wkd_l import WKDLogitLoss, wkd_l_loss
from tests.golden.published import published, repeats

GOLDEN = published("wasserstein")
_double = GOLDEN.double
INPUTS = GOLDEN["inputs"]
CASES = {case["name"]: case for case in GOLDEN["official"] if case["name"].startswith("wkd_logit")}
EDGE_CASES = [case for case in GOLDEN["edge_cases"] if case["method"] == "wkd_logit_loss"]
COSTS = torch.tensor(INPUTS["wkd_cost"], dtype=torch.float64)
TARGETS = torch.tensor(INPUTS["targets"])
PLAIN = {"transport_weight": 1.0, "kappa": 0.0, "separate_target": False}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wkd_l_repeats_the_official_code(name, dtype):
    case, (student, teacher) = CASES[name], (_double(f"logits_{of}").to(dtype) for of in "st")
    given = case["hyperparameters"]
    student.requires_grad_()
    names = {"T": "temperature", "reg": "epsilon", "iters": "iterations"}
    options = {option: given[key] for key, option in names.items()}
    options |= {"transport_weight": given.get("gamma", 1.0), "kappa": 0.0}  # sharp already
    options["separate_target"] = "separated" in name
    value = wkd_l_loss(student, teacher, TARGETS, COSTS, **options)
    assert value.shape == (4,)
    repeats(case, value.mean(), student, rel=1e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", EDGE_CASES, ids=lambda case: case["what"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_limits_of_the_official_code(case, dtype):
    student = torch.tensor(case["logits_s"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(case["logits_t"], dtype=dtype)
    value = wkd_l_loss(student, teacher, None, COSTS, temperature=case["T"], **PLAIN)
    value.sum().backward()
    assert value.item() == pytest.approx(float(case["value"]), rel=1e-5)
    gradient = [[float(number) for number in case["grad"]]]
    atol = 1e-6 if dtype == torch.float16 else 1e-8  # the gradient comes back in half precision
    torch.testing.assert_close(
        student.grad, torch.tensor(gradient, dtype=dtype), rtol=1e-3, atol=atol
    )


def test_a_student_sure_of_something_else_hears_nothing():
    student = torch.tensor([[400.0, 0, 0, 0]], requires_grad=True)
    costs = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 1.0, "separate_target": False}
    wkd_l_loss(student, torch.tensor([[0.0, 400, 0, 0]]), None, costs, **options).sum().backward()
    assert (student.grad == 0).all()


def test_the_target_has_a_part_of_its_own():
    student, teacher = _double("logits_s"), _double("logits_t")
    value = wkd_l_loss(student, teacher, TARGETS, COSTS, transport_weight=0.0)
    p, q = student.softmax(1), teacher.softmax(1)
    rows = torch.arange(4)
    torch.testing.assert_close(value, -q[rows, TARGETS] * p[rows, TARGETS].log())
    shifted = student + 5 * F.one_hot(TARGETS, 6)
    rest = [wkd_l_loss(z, teacher, TARGETS, COSTS) for z in (student, shifted)]
    own = [wkd_l_loss(z, teacher, TARGETS, COSTS, transport_weight=0) for z in (student, shifted)]
    torch.testing.assert_close(rest[0] - own[0], rest[1] - own[1])


@pytest.mark.parametrize("debiased", [False, True])
def test_two_classes_leave_nothing_to_transport(debiased):
    student = torch.tensor([[3.0, -1.0], [0.5, 0.2]], requires_grad=True)
    teacher, targets = torch.tensor([[-2.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1])
    costs = torch.ones(2, 2).fill_diagonal_(0)
    value = wkd_l_loss(student, teacher, targets, costs, debiased=debiased)
    alone = wkd_l_loss(student, teacher, targets, costs, transport_weight=0.0)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(value, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(alone.sum(), student)[0])


def test_debiased_a_copy_of_the_teacher_is_free():
    student = _double("logits_s")
    options = {"separate_target": False, "kappa": 0.0}
    assert (wkd_l_loss(student, student, None, COSTS, **options) > 0.1).all()
    free = wkd_l_loss(student, student, None, COSTS, debiased=True, **options)
    assert free.abs().max() < 1e-12


def test_the_class_asks_for_its_costs():
    loss = LOSSES.create("wkd_l", cost="logits", separate_target=False)
    assert isinstance(loss, WKDLogitLoss)
    assert loss.needs == (Logits(), ClassCosts("logits"))
    assert loss.reads == (Logits(),)
    assert not loss.needs_targets
    assert WKDLogitLoss().needs_targets
    student, teacher = _double("logits_s"), _double("logits_t")
    sent = {Logits(): teacher, ClassCosts(): COSTS}
    value = WKDLogitLoss()({Logits(): student}, sent, TARGETS, TeacherWeights(torch.ones(4)))
    torch.testing.assert_close(value, wkd_l_loss(student, teacher, TARGETS, COSTS))


def test_other_refusals():
    with pytest.raises(ValueError, match="separate_target needs targets"):
        wkd_l_loss(_double("logits_s"), _double("logits_t"), None, COSTS)
