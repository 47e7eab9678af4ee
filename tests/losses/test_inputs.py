"""One rule of all losses for what they are given: see `fedkd.losses.base.Loss`."""

import importlib
import inspect
import math
from contextlib import nullcontext
from dataclasses import FrozenInstanceError

import pytest
import torch

from fedkd.functional.feature_statistics import (
    cell_statistics,
    class_maps,
    spatial_moments,
    spectral_norms,
)
from fedkd.functional.optimal_transport import transport_cost
from fedkd.functional.similarity import linear_cka
from fedkd.knowledge.kinds import Classifier, Logits, Pooled
from fedkd.losses import LOSSES
from fedkd.losses.kd import kd_loss
from fedkd.losses.wkd_l import wkd_l_loss
from tests.losses.contract import NAMES, VARIANTS, adapted, batch, call, each, title

FUNCTIONS = {
    name: getattr(importlib.import_module(f"fedkd.losses.{name}"), f"{name}_loss") for name in NAMES
}
variants = pytest.mark.parametrize("variant", VARIANTS, ids=title)
WITH_LABELS = [name for name in NAMES if LOSSES.create(name).needs_targets]


def _ready(variant, size=6, classes=5):
    """An adapted loss and its batch."""
    loss = LOSSES.create(variant[0], **variant[1])
    found = batch(loss, size, classes)
    return adapted(loss, *found[:2]), *found


def _spoilt(tensor, number):
    flat = tensor.flatten().clone()
    flat[1] = number
    return flat.view(tensor.shape)


def _slopes(loss, student, teacher, targets, weights, context=None):
    student = {kind: tensor.requires_grad_() for kind, tensor in student.items()}
    with context or nullcontext():
        value = call(loss, student, teacher, targets, weights)
    value.sum().backward()
    return value.detach(), [t.grad for t in student.values() if t.grad is not None]


@variants
def test_a_number_that_is_none_is_never_hidden(variant):
    loss, student, teacher, targets, weights = _ready(variant)
    for number in (math.nan, math.inf):
        for kind in student:
            spoilt = student | {kind: _spoilt(student[kind], number)}
            assert not call(loss, spoilt, teacher, targets, weights).isfinite().all(), kind
        for kind in loss.needs:
            spoilt = teacher | {kind: _spoilt(teacher[kind], number)}
            if not kind.per_sample and number == math.inf:
                continue  # an infinite cost has a limit
            if kind in (Pooled(), Classifier()) and variant[0] in ("hcd", "camkd"):
                # Mixed with the student's maps before the formula sees it.
                assert not call(loss, student, spoilt, targets, weights).isfinite().all()
                continue
            # A bad teacher is not taken for a student that diverges.
            with pytest.raises(ValueError, match=f"loss '{variant[0]}': .* holds (NaN|inf)"):
                call(loss, student, spoilt, targets, weights)


@variants
def test_the_gradient_is_finite_where_the_value_is(variant):
    loss, student, teacher, targets, weights = _ready(variant, 4)
    loss.eval()

    def alike(t):
        return t[:1].expand_as(t)

    def twice(t):
        return torch.cat([t[::2], t[::2]])

    shapes = [alike, twice, torch.zeros_like, torch.ones_like]
    shapes += [lambda t, s=s: t * s for s in (1e-38, 1e-20, 1e-8, 1e8, 1e15)]
    for ours in (*shapes, torch.clone):
        for theirs in (shapes[0], shapes[2], shapes[4], shapes[-1], torch.clone):
            read = {kind: tensor.detach().clone() for kind, tensor in each(student, ours).items()}
            value, slopes = _slopes(loss, read, each(teacher, theirs), targets, weights)
            if value.isfinite().all():
                assert all(slope.isfinite().all() for slope in slopes)


@variants
def test_all_must_be_of_one_batch(variant):
    loss, student, teacher, targets, weights = _ready(variant)
    who = f"loss '{variant[0]}'"
    for size in (1, 5):
        for kind in loss.needs:
            if kind.per_sample:
                with pytest.raises(ValueError, match=who):
                    call(loss, student, teacher | {kind: teacher[kind][:size]}, targets, weights)
        if loss.needs_targets and variant[0] != "mmkd":
            with pytest.raises(ValueError, match=f"{who}: targets must be \\(6,\\), got"):
                call(loss, student, teacher, targets[:size], weights)
    if "weights" in inspect.signature(FUNCTIONS[variant[0]]).parameters:
        name, wrong = variant[0], weights[:1]
        if loss.needs and call(loss, student, teacher, targets, weights).ndim == 0:
            with pytest.raises(ValueError, match=f"loss '{name}': weights must be \\(6,\\)"):
                call(loss, student, teacher, targets, wrong)


def test_a_weight_for_each_teacher_and_sample():
    student, teachers = torch.randn(4, 3), torch.randn(2, 4, 3)
    for wrong in ((2, 1), (1, 4), (4,)):
        with pytest.raises(ValueError, match=r"loss 'aver': weights must be \(2, 4\), got"):
            FUNCTIONS["aver"](student, teachers, weights=torch.ones(wrong))
    with pytest.raises(ValueError, match="a teacher must answer each of the student's 4 samples"):
        FUNCTIONS["aver"](student, teachers[:, :1])


@variants
def test_an_empty_batch_is_refused(variant):
    loss, student, teacher, targets, weights = _ready(variant)
    loss.eval()
    nobody = each(student, lambda t: t[:0]), each(teacher, lambda t: t[:0])
    with pytest.raises(ValueError, match="empty"):
        call(loss, *nobody, targets[:0], weights[:0])


PROBABILITIES = ["kd", "dkd", "aver", "ebkd", "camkd", "aekd", "dgkd", "takd", "ce", "wkd_l"]


@pytest.mark.parametrize("name", [name for name in NAMES if Logits() in LOSSES.create(name).reads])
def test_a_masked_class_is_none_or_refused(name):
    """Class 4 is -inf for both: as if there were four classes, if the loss is one of those."""
    loss, student, teacher, targets, weights = _ready((name, {}))
    targets = targets % 4

    def masked(t):
        return t.index_fill(-1, torch.tensor(4), -math.inf) if t.shape[-1] == 5 else t

    student[Logits()] = masked(student[Logits()])
    if loss.needs:
        teacher[Logits()] = masked(teacher[Logits()])
    if name in ("vrm", "relation", "mmkd", "hcd"):
        with pytest.raises(ValueError, match=f"loss '{name}': teacher_?\\w* .* holds -inf"):
            call(loss, student, teacher, targets, weights)
        return
    value, slopes = _slopes(loss, student, teacher, targets, weights)
    assert value.isfinite().all()
    assert all(slope.isfinite().all() for slope in slopes)
    assert (slopes[0][:, 4] == 0).all()
    if name in PROBABILITIES and name != "wkd_l":
        four = [each(side, lambda t: t.detach()[:, :4]) for side in (student, teacher)]
        expected, expected_slopes = _slopes(loss, *four, targets, weights)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(slopes[0][:, :4], expected_slopes[0])


@pytest.mark.parametrize("name", [name for name in PROBABILITIES if name != "ce"])
def test_a_class_that_one_side_masks(name):
    loss, student, teacher, targets, weights = _ready((name, {}))
    column = torch.tensor(3)
    masked = teacher | {Logits(): teacher[Logits()].index_fill(1, column, -math.inf)}
    value, slopes = _slopes(loss, dict(student), masked, targets, weights)
    assert value.isfinite().all()
    assert slopes[0].isfinite().all()
    # What the teacher finds possible and the student does not is infinitely far, as in torch.
    masked = {Logits(): student[Logits()].detach().index_fill(1, column, -math.inf)}
    value, slopes = _slopes(loss, masked, teacher, targets, weights)
    assert not value.isnan().any()
    assert value.isinf().any() or name == "wkd_l"
    assert slopes[0].isfinite().all() or name == "wkd_l"


def test_a_teacher_that_masks_all_classes_is_no_uniform_one():
    nothing = torch.full((2, 3), -math.inf)
    for function in (kd_loss, dkd_with_labels := FUNCTIONS["dkd"]):
        labels = (torch.tensor([0, 1]),) if function is dkd_with_labels else ()
        with pytest.raises(ValueError, match=r"teacher_logits .* holds -inf"):
            function(torch.randn(2, 3), nothing, *labels)


@pytest.mark.parametrize("name", [name for name in NAMES if Logits() in LOSSES.create(name).reads])
def test_a_single_class_is_refused_where_it_is_a_softmax(name):
    loss, student, teacher, targets, weights = _ready((name, {}), classes=2)
    one = [each(side, lambda t: t[:, :1] if t.shape[1] == 2 else t) for side in (student, teacher)]
    if name == "relation":  # distances between numbers are as good as those between vectors
        assert call(loss, *one, targets * 0, weights).isfinite()
        return
    with pytest.raises(ValueError, match="two classes or more"):
        call(loss, *one, targets * 0, weights)


@pytest.mark.parametrize("name", [name for name in WITH_LABELS if name != "mmkd"])
def test_targets_are_class_numbers(name):
    loss, student, teacher, targets, weights = _ready((name, {}))
    value = call(loss, student, teacher, targets, weights)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(call(loss, student, teacher, targets.to(dtype), weights), value)
    for wrong, message in [
        (torch.full_like(targets, -100), "from 0 to 4, got -100"),
        (torch.full_like(targets, 5), "from 0 to 4, got 5"),
        (targets.float(), "integer dtype, got float32"),
        (targets > 2, "integer dtype, got bool"),
        (targets[:, None], "\\(6,\\), got \\(6, 1\\)"),
    ]:
        with pytest.raises(ValueError, match=f"loss '{name}': targets must be .*{message}"):
            call(loss, student, teacher, wrong, weights)


def test_options_are_words_and_numbers_that_mean_something():
    for name, build in [(n, b) for n in NAMES for b in (LOSSES.get(n), FUNCTIONS[n])]:
        for option, parameter in inspect.signature(build).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY:
                continue
            words = isinstance(parameter.default, str)
            number = isinstance(parameter.default, float)
            wrong = ["foo"] if words else [math.nan, math.inf, "foo"] if number else []
            wrong += [0.0, -1.0] if option in ("temperature", "sigma", "eps", "delta") else []
            for value in wrong:
                with pytest.raises(ValueError, match=f"loss '{name}': {option} must be"):
                    build(**{option: value})


WRONG = [
    ("aekd", {"nu": 0.0}, r"nu must be in \(0, 1\]"),
    ("aekd", {"nu": 1.5}, r"nu must be in \(0, 1\]"),
    ("camkd", {"logit_weight": 0.0}, "logit_weight and feature_weight are both 0"),
    ("camkd", {"factor": 0}, "factor must be at least 1, got 0"),
    ("cat", {"size": 0}, "size must be at least 1, got 0"),
    ("cat", {"keep": 0}, "keep must be at least 1, got 0"),
    ("ce", {"label_smoothing": 1.0}, "label_smoothing must be in"),
    ("dgkd", {"drop": -1}, "drop must be at least 0, got -1"),
    ("dgkd", {"survival": 0.0}, r"survival must be in \(0, 1\], got 0.0"),
    ("dgkd", {"survival": 0.5, "drop": 1}, "exclude each other"),
    ("ebkd", {"entropy_temperature": 0}, "entropy_temperature must be positive, got 0"),
    ("hcd", {"stages": 0}, "stages must be at least 1, got 0"),
    ("hcd", {"sub_heads": 0}, "sub_heads must be at least 1, got 0"),
    ("hcd", {"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1"),
    ("london", {"stages": 1}, "stages must be at least 2, got 1"),
    ("london", {"iterations": 0}, "iterations must be at least 1, got 0"),
    ("mmkd", {"hidden": 0}, "hidden must be at least 1, got 0"),
    ("mmkd", {"meta_every": 0}, "meta_every must be at least 1, got 0"),
    ("ofd", {"stages": 0}, "stages must be at least 1, got 0"),
    ("ofd", {"scale": 0}, "scale must be positive, got 0"),
    ("vrm", {"rho": 1.0}, "rho must be in"),
    ("vrm", {"edges": "real", "pruning": "view_discrepancy"}, "compares two views"),
    ("wkd_f", {"grid": 0}, "grid must be at least 1, got 0"),
    ("wkd_f", {"grid": 2, "covariance": "full"}, "whole map, but grid is 2"),
    ("wkd_l", {"epsilon": 0}, "epsilon must be positive, got 0"),
    ("wkd_l", {"iterations": 0}, "iterations must be at least 1, got 0"),
    ("wkd_l", {"kappa": -1.0}, "kappa must be at least 0"),
]


def test_options_that_a_loss_cannot_take_are_named():
    for name, options, message in WRONG:
        with pytest.raises(ValueError, match=f"loss '{name}': .*{message}"):
            LOSSES.create(name, **options)


def test_the_class_and_its_formula_have_the_same_options():
    for name in NAMES:
        loss, formula = LOSSES.create(name), inspect.signature(FUNCTIONS[name]).parameters
        for option, value in vars(loss.options).items():
            assert formula[option].default == value == LOSSES.options(name)[option].default
        with pytest.raises(FrozenInstanceError):
            loss.options.temperature = 1.0


@variants
def test_autocast_keeps_out(variant):
    loss, student, teacher, targets, weights = _ready(variant)
    if any(True for _ in loss.parameters()):
        return  # its own layers may run in half precision
    value, slopes = _slopes(loss, dict(student), teacher, targets, weights)
    for dtype in (torch.bfloat16, torch.float16):
        read = {kind: tensor.detach() for kind, tensor in student.items()}
        autocast = torch.autocast("cpu", dtype=dtype)
        cast, cast_slopes = _slopes(loss, read, teacher, targets, weights, autocast)
        assert torch.equal(cast, value)
        assert all(map(torch.equal, cast_slopes, slopes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_out_of_readings_and_of_formulas_behind_the_losses(dtype):
    torch.manual_seed(0)
    maps, deep, weight = torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4), torch.randn(7, 3)
    points, other = torch.randn(9, 4), torch.randn(9, 3)
    p, q = torch.rand(2, 2, 5).softmax(dim=2)
    for function in (
        lambda: class_maps(maps, weight, 2),
        lambda: cell_statistics(maps, 3),
        lambda: spatial_moments(maps),
        lambda: spectral_norms([maps, deep]),
        lambda: spectral_norms([maps, deep], gradient="unrolled"),
        lambda: linear_cka(points, other),
        lambda: transport_cost(p, q, torch.rand(5, 5, generator=torch.Generator().manual_seed(0))),
    ):
        expected = function()
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(function(), expected)


def test_sharp_costs_stay_finite_under_float16():
    student, teacher = torch.randn(2, 3, 4)
    costs = torch.rand(4, 4).fill_diagonal_(0)
    options = {"separate_target": False, "kappa": 2.0}
    expected = wkd_l_loss(student, teacher, None, costs, **options)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(wkd_l_loss(student, teacher, None, costs, **options), expected)
