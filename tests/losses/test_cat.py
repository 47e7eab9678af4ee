"""Class attention transfer: official numbers, the partial and binarised kinds, and edges."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedkd.knowledge.kinds import ClassMaps
from fedkd.losses.base import TeacherWeights
from fedkd.losses.cat import CATLoss, cat_loss
from fedkd.losses.ce import ce_loss
from tests.golden.published import published, repeats
from tests.losses.contract import draw

GOLDEN = published("features")
_double = GOLDEN.double
CASES = {name: case for name, case in GOLDEN["official"].items() if name.startswith("cat")}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cat_loss")])
def test_cat_repeats_the_official_code(name):
    case, maps = CASES[name], _double("map_s_4x4").requires_grad_()
    given = case["hyperparameters"]
    options = {"size": given["CAM_RESOLUTION"], "normalise": given["IF_NORMALIZE"]}
    loss = cat_loss(maps, _double(case["inputs"][1]), **options)
    assert loss.shape == (2,)
    repeats(case, loss.mean(), maps, rel=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", ["catkd_full_norm0", "cat_only_norm1", "cat_only_binarized"])
def test_cat_kd_is_cat_beside_cross_entropy(name):
    case, maps = CASES[name], _double("cam_s").requires_grad_()
    options = case["hyperparameters"]
    cat = cat_loss(
        maps, _double("cam_t"), normalise=options["norm"], binarise=options["binz"]
    ).mean()
    ce = ce_loss(maps.mean(dim=(2, 3)), torch.tensor(GOLDEN["inputs"]["cam_targets"])).mean()
    repeats(case, options["beta"] * cat + options["ce"] * ce, maps, rel=1e-12, rtol=1e-10)


def test_with_one_place_and_unit_length_only_the_sign_is_left():
    student, teacher = draw(4, 3, 2, 2), draw(4, 3, 5, 5, seed=1)
    agree = student.mean(dim=(2, 3)).sign() == teacher.mean(dim=(2, 3)).sign()
    expected = torch.where(agree, 0.0, 4.0).double().mean(dim=1)
    torch.testing.assert_close(cat_loss(student, teacher, size=1), expected)


def test_maps_averaged_by_the_client_give_the_same_loss():
    student, teacher = draw(4, 3, 8, 8), draw(4, 3, 6, 6, seed=1)
    pooled = F.adaptive_avg_pool2d(teacher, 3)
    torch.testing.assert_close(
        cat_loss(student, pooled, size=3), cat_loss(student, teacher, size=3)
    )


def test_binarised_maps_are_ones_above_the_mean_absolute_value():
    teacher = torch.tensor([[[[4.0, 1], [-3, 0]]]])  # mean absolute value 2
    student = torch.tensor([[[[1.0, 0], [0, 0]]]])
    assert cat_loss(student, teacher, normalise=False, binarise=True) == 0
    assert cat_loss(-student, teacher, normalise=False, binarise=True) == 1.0


LOGITS = torch.tensor([[0.4, 3.0, -1.0, 2.0, 1.0], [5.0, 1.0, 2.0, 4.0, 3.0]])


@pytest.mark.parametrize(
    ("rule", "keep", "kept"),
    [
        ("top", 2, [[1, 3], [0, 3]]),
        ("top", 9, [range(5), range(5)]),
        ("above_nth", 3, [[1, 3], [0, 3]]),  # the published strategy 0 keeps one fewer
        ("above_nth", 1, [[], []]),  # none, where the published code cannot go on
        ("below_nth_of_100", 97, [[0, 2, 4], [1, 2, 4]]),  # not above the third
        ("below_nth_of_100", 100, [[2], [1]]),  # index -1, the last
    ],
)
def test_partial_maps_are_the_mean_over_the_kept_classes(rule, keep, kept):
    student, teacher = draw(2, 5, 2, 2).requires_grad_(), draw(2, 5, 2, 2, seed=1)
    loss = cat_loss(student, teacher, LOGITS, normalise=False, keep=keep, keep_rule=rule)
    squares = (student - teacher).square().mean(dim=(2, 3))
    expected = [squares[row, list(classes)].sum() / max(len(classes), 1)
                for row, classes in enumerate(kept)]  # fmt: skip
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    for row, classes in enumerate(kept):
        for column in range(5):
            assert gradient[row, column].any() == (column in classes)


def test_without_logits_classes_are_ranked_by_their_mean_map():
    student, teacher = draw(2, 5, 2, 2), draw(2, 5, 2, 2, seed=1)
    torch.testing.assert_close(
        cat_loss(student, teacher, keep=2),
        cat_loss(student, teacher, teacher.mean(dim=(2, 3)), keep=2),
    )


def test_ties_in_the_published_rule_keep_all_classes_or_share_one_mean():
    student, teacher = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    squares = (student - teacher).square().mean(dim=(2, 3))

    def loss(*logits):
        return cat_loss(
            student, teacher, torch.tensor(logits),
            normalise=False, keep=3, keep_rule="above_nth",
        ).mean()  # fmt: skip

    exact = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    # Three kept classes are no multiple of two samples.
    exact(loss([3.0, 2, 1], [3.0, 1, 1]), squares.mean())
    # Two are, and the published code takes the mean over both, whoever they belong to.
    exact(loss([3.0, 2, 1], [1.0, 1, 1]), squares[0, :2].mean())


def test_cat_equals_numpy():
    student, teacher = draw(3, 4, 4, 4), draw(3, 4, 4, 4, seed=1)

    def coarse(maps):
        maps = maps.numpy().reshape(3, 4, 2, 2, 2, 2).mean(axis=(3, 5)).reshape(3, 4, 4)
        return maps / np.linalg.norm(maps, axis=2, keepdims=True)

    expected = ((coarse(student) - coarse(teacher)) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(cat_loss(student, teacher).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"normalise": False}, {"keep": 2}, {"binarise": True}])
def test_cat_gradcheck_and_order(options):
    student, teacher = draw(3, 4, 4, 4).requires_grad_(), draw(3, 4, 4, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: cat_loss(s, teacher, **options), (student,))
    rows, classes = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    moved = cat_loss(student[rows][:, classes], teacher[rows][:, classes], **options)
    torch.testing.assert_close(moved, cat_loss(student, teacher, **options)[rows])


def test_the_scale_of_normalised_maps_does_not_matter():
    student, teacher = draw(3, 4, 4, 4), draw(3, 4, 4, 4, seed=1)
    scaled = cat_loss(1e4 * student, 1e-3 * teacher)
    torch.testing.assert_close(scaled, cat_loss(student, teacher))


def test_cat_asks_for_full_maps_only_if_it_binarises_them():
    assert CATLoss(size=4).needs == CATLoss(size=4).reads == (ClassMaps(4),)
    loss = CATLoss(size=4, binarise=True)
    assert (loss.needs, loss.reads) == ((ClassMaps(None),), (ClassMaps(4),))
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 8, 8, seed=1)
    value = loss(
        {ClassMaps(4): student}, {ClassMaps(None): teacher}, None, TeacherWeights(torch.ones(2))
    )
    torch.testing.assert_close(value, cat_loss(student, teacher, size=4, binarise=True))


def test_a_rule_that_does_not_fit_the_classes_is_named():
    with pytest.raises(ValueError, match="keep 75 by 'below_nth_of_100' does not fit 5 classes"):
        cat_loss(draw(2, 5, 2, 2), draw(2, 5, 2, 2), keep=75, keep_rule="below_nth_of_100")
