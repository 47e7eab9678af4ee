"""Wasserstein distillation of features: published values, both covariances, projectors."""

from functools import partial

import pytest
import torch
from torch import nn

from fedkd.functional.feature_statistics import cell_statistics, spatial_moments
from fedkd.knowledge.kinds import FeatureMoments, FeatureStatistics, Stage
from fedkd.losses.base import TeacherWeights
from fedkd.losses.wkd_f import WKDFeatureLoss, wkd_f_loss
from tests.golden.published import published, repeats
from tests.losses.contract import draw

GOLDEN = published("wasserstein")
_double = GOLDEN.double
CASES = {case["name"]: case for case in GOLDEN["official"] if case["name"].startswith("wkd_feat")}


_draw = partial(draw, dtype=torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_wkd_f_repeats_the_official_code(name):
    case = CASES[name]
    student, teacher = (_double(key) for key in case["inputs"])
    grid = case["hyperparameters"]["SPATIAL_GRID"]
    statistics = cell_statistics(teacher, grid)
    value = wkd_f_loss(student.requires_grad_(), statistics, mean_weight=4.0)
    assert value.shape == (len(student),)
    repeats(case, value.mean(), student, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(wkd_f_loss(cell_statistics(student, grid), statistics), value)


def test_full_covariance_repeats_the_reference():
    (case,) = (c for c in GOLDEN["not_official"] if c["name"].startswith("gaussian"))
    student, teacher = _double("map_s_8x8"), _double("map_t_8x8")
    moments = spatial_moments(teacher)
    for mean_weight in (0.0, 1.0, 4.0):
        value = wkd_f_loss(student, moments, mean_weight=mean_weight)
        terms = case["per_sample_mean_and_cov_terms"]
        expected = [mean_weight * mean + spread for mean, spread in terms]
        assert value.tolist() == pytest.approx(expected, rel=1e-9)


def test_full_and_diagonal_agree_where_channels_are_independent():
    waves = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).double()
    student, teacher = (
        (torch.tensor(by).double()[:, None] * waves).view(1, 3, 2, 2)
        for by in ([1, 2, 3], [2, 7, 1])
    )
    assert wkd_f_loss(student, spatial_moments(teacher)).item() == pytest.approx(1 + 25 + 4)
    # Unbiased variances are 4/3 as large.
    diagonal = wkd_f_loss(student, cell_statistics(teacher, eps=0.0))
    assert diagonal.item() == pytest.approx(30 * 4 / 3, rel=1e-4)


def test_one_pixel_cells_compare_means_only():
    student, teacher = _draw(2, 3, 4, 4).requires_grad_(), _draw(2, 3, 4, 4, seed=1)
    value = wkd_f_loss(student, cell_statistics(teacher, 4), mean_weight=2.0)
    expected = 2 * (student - teacher).square().sum(dim=(1, 2, 3)) / 16
    torch.testing.assert_close(value, expected)
    found, wanted = (torch.autograd.grad(v.sum(), student)[0] for v in (value, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(4, 3, 3), (12, 3, 3)])
def test_full_covariance_gradcheck(shape):
    student, teacher = (_draw(2, *shape, seed=seed).double() for seed in (0, 1))
    moments = spatial_moments(teacher)
    assert torch.autograd.gradcheck(
        lambda x: wkd_f_loss(x, moments), (student.requires_grad_(),), atol=1e-4
    )


def _call(loss, student, teacher):
    (kind,) = loss.needs
    sent = {kind: kind_tensor(kind, teacher)}
    read = {Stage(loss.stage): student}
    ready = loss.adapted(read, sent)
    assert loss.projection is None
    return ready, ready(read, sent, None, TeacherWeights(torch.ones(len(student))))


def kind_tensor(kind, maps):
    if isinstance(kind, FeatureMoments):
        return spatial_moments(maps)
    return cell_statistics(maps, kind.grid)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("projector", ["conv1x1", "bottleneck"])
def test_widths_and_sizes_may_differ(covariance, projector):
    loss = WKDFeatureLoss(covariance=covariance, projector=projector)
    student = _draw(3, 2, 4, 4).requires_grad_()
    ready, value = _call(loss, student, _draw(3, 5, 7, 7, seed=1))
    value.sum().backward()
    assert value.shape == (3,)
    assert student.grad.abs().max() > 0
    assert all(p.grad is not None for p in ready.projection.parameters())


def test_the_projected_map_is_what_is_compared():
    loss = WKDFeatureLoss(grid=2, mean_weight=3.0)
    student, teacher = _draw(3, 2, 4, 4), _draw(3, 5, 4, 4, seed=1)
    ready, value = _call(loss, student, teacher)
    expected = wkd_f_loss(ready.projection(student), cell_statistics(teacher, 2), mean_weight=3.0)
    torch.testing.assert_close(value, expected)


def test_relu_is_left_out_where_the_teacher_is_negative():
    signed, positive = _draw(3, 5, 4, 4), _draw(3, 5, 4, 4).abs()
    for relu, teacher, expected in [
        ("auto", signed, False),
        ("auto", positive, True),
        (True, signed, True),
        (False, positive, False),
    ]:
        for covariance in ("diagonal", "full"):
            loss = WKDFeatureLoss(relu=relu, covariance=covariance)
            assert _call(loss, _draw(3, 2, 4, 4), teacher)[0].projection.relu is expected


def test_without_projector_widths_must_agree():
    loss, maps = WKDFeatureLoss(projector="none"), _draw(3, 5, 4, 4)
    ready, value = _call(loss, maps, maps)
    assert isinstance(ready.projection, nn.Identity)
    assert (value < 1e-8).all()
    with pytest.raises(ValueError, match=r"loss 'wkd_f': .* needs 5 channels, it has 2"):
        _call(loss, maps[:, :2], maps)


def test_the_class_asks_for_what_it_compares():
    assert WKDFeatureLoss(stage=1, grid=4).needs == (FeatureStatistics(1, 4),)
    assert WKDFeatureLoss(teacher_stage=2, covariance="full").needs == (FeatureMoments(2),)
    assert WKDFeatureLoss(stage=1, teacher_stage=2).reads == (Stage(1),)


def test_refusals():
    maps = _draw(1, 3, 4, 4)
    for statistics in (cell_statistics, spatial_moments):
        with pytest.raises(ValueError, match=r"loss 'wkd_f': student .* does not fit teacher"):
            wkd_f_loss(maps[:, :2], statistics(maps))
    with pytest.raises(ValueError, match="does not fit"):
        wkd_f_loss(cell_statistics(maps, 2), cell_statistics(maps, 1))
