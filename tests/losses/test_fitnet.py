"""FitNets: official numbers with and without the regressor, sizes, signs."""

import pytest
import torch
from torch import nn

from fedkd.knowledge.kinds import Stage
from fedkd.losses.base import TeacherWeights
from fedkd.losses.fitnet import FitNetLoss, fitnet_loss
from fedkd.models.projectors import regressor
from tests.golden.published import published, repeats
from tests.losses.contract import draw

GOLDEN = published("features")
_double = GOLDEN.double


def test_fitnet_repeats_the_official_hint():
    maps = _double("map_s_4x4").requires_grad_()
    loss = fitnet_loss(maps, _double("map_t_4x4"))
    assert loss.shape == (2,)
    case = GOLDEN["official"]["fitnet_hint_mse"]
    repeats(case, loss.mean(), maps, rel=1e-12, rtol=1e-10)


def test_fitnet_repeats_the_original_cost():
    loss = fitnet_loss(_double("map_s_4x4"), _double("map_t_4x4"), reduction="half_sum_channel")
    expected = GOLDEN["derived"]["fitnet_original_hint_cost"]["value"]
    assert loss.mean().item() == pytest.approx(expected, rel=1e-12)


def _golden_regressor():
    convreg = regressor((2, 4, 4), (3, 4, 4)).double().eval()
    values = [
        _double(f"convreg_{name}")
        for name in (
            "conv_weight", "conv_bias", "bn_weight", "bn_bias", "bn_running_mean", "bn_running_var"
        )
    ]  # fmt: skip
    slots = {key: slot for key, slot in convreg.state_dict().items() if slot.dim() > 0}
    for slot, value in zip(slots.values(), values, strict=True):
        slot.copy_(value)
    return convreg


def test_fitnet_repeats_the_official_code_with_its_regressor():
    maps = _double("feat_s_ch2_4x4").requires_grad_()
    regressed = _golden_regressor()(maps)
    value = fitnet_loss(regressed, _double("map_t_4x4")).mean()
    case = GOLDEN["official"]["fitnet_convreg_mse_bn_eval"]
    repeats(case, value, maps, rel=1e-12, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "half_sum_channel"])
def test_fitnet_gradcheck(reduction):
    teacher = draw(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: fitnet_loss(s, teacher, reduction=reduction),
        (draw(2, 3, 2, 2).requires_grad_(),),
    )


@pytest.mark.parametrize(
    ("ours", "theirs"), [((4, 8, 8), (6, 8, 8)), ((4, 8, 8), (6, 4, 4)), ((4, 4, 4), (6, 8, 8))]
)
def test_the_adapted_loss_learns_to_meet_the_teacher(ours, theirs):
    torch.manual_seed(0)
    student = {Stage(-2): torch.randn(4, *ours)}
    teacher = {Stage(-2): torch.randn(4, *theirs).relu()}
    loss = FitNetLoss()
    ready = loss.adapted(student, teacher)
    assert list(loss.parameters()) == []
    optimizer = torch.optim.Adam(ready.parameters(), lr=0.02)
    values = []
    for _ in range(30):
        value = ready(student, teacher, None, TeacherWeights(torch.ones(4))).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


def _ends_in_relu(loss, sign):
    hint = torch.full((4, 3, 4, 4), sign)
    ready = loss.adapted({Stage(-2): torch.randn(4, 2, 4, 4)}, {Stage(-2): hint})
    return bool((ready.regressor(torch.randn(4, 2, 4, 4)) >= 0).all())


def test_the_regressor_has_no_relu_if_the_hint_is_signed():
    assert _ends_in_relu(FitNetLoss(), 1.0)
    assert not _ends_in_relu(FitNetLoss(), -1.0)
    assert _ends_in_relu(FitNetLoss(relu=True), -1.0)
    assert not _ends_in_relu(FitNetLoss(relu=False), 1.0)


def test_copies_for_two_teachers_share_nothing():
    student = {Stage(-2): torch.randn(4, 2, 4, 4)}
    loss = FitNetLoss()
    one = loss.adapted(student, {Stage(-2): torch.randn(4, 3, 4, 4)})
    two = loss.adapted(student, {Stage(-2): torch.randn(4, 5, 4, 4)})
    assert isinstance(one.regressor, nn.Module)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


def test_stages_may_differ():
    loss = FitNetLoss(stage=1, teacher_stage=-1)
    assert (loss.reads, loss.needs) == ((Stage(1),), (Stage(-1),))


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"loss 'fitnet': .*2x2 .* 6x6"):
        FitNetLoss().adapted(
            {Stage(-2): torch.randn(2, 3, 2, 2)}, {Stage(-2): torch.randn(2, 3, 6, 6)}
        )
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 2\), the teacher's \(2, 4, 2, 2\)"):
        fitnet_loss(torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 2, 2))
