"""Virtual relation matching as a loss of the objective."""

import pytest
import torch

from fedkd.knowledge.kinds import Logits, VirtualLogits
from fedkd.losses.base import TeacherWeights
from fedkd.losses.kd import standardised
from fedkd.losses.vrm import VRMLoss, vrm_loss
from tests.functional.relation_losses import class_relation_loss, sample_relation_loss
from tests.golden.published import published
from tests.losses.contract import draw

GOLDEN = published("output_relational")
RECONSTRUCTION = GOLDEN["not_official_vrm_reconstruction"]["cases"]


def _views(size=5):
    return draw(4, size, 4).unbind()


def _kinds(real, virtual):
    return {Logits(): real, VirtualLogits(0): virtual}


@pytest.mark.parametrize("case", RECONSTRUCTION, ids=lambda case: case["name"])
def test_golden_reconstruction(case):
    """A literal reconstruction of the published formulas, not the authors' code."""
    name = case["name"]
    keys = ("logits_s", "logits_s_virtual", "logits_t", "logits_t_virtual")
    a, b, *_ = views = [GOLDEN.double(key) for key in keys]
    a.requires_grad_(), b.requires_grad_()
    value = vrm_loss(
        *views,
        sample_weight=float("_is_" in name),
        class_weight=float("_ic_" in name),
        standardise=name.endswith("zscore"),
        edges="full" if "_full_" in name else "real" if "real_only" in name else "real_virtual",
        distance="huber" if "huber" in name else "squared" if "_sq_" in name else "cosine",
        reduction="elements" if "elemmean" in name else "edges",
    )
    gradients = torch.autograd.grad(value, (a, b), allow_unused=True)
    assert value.item() == pytest.approx(case["value"], rel=1e-10)
    for got, key in zip(gradients, ("grad_logits_s", "grad_logits_s_virtual"), strict=True):
        if case[key] is None:
            assert got is None
        else:
            expected = torch.tensor(case[key], dtype=torch.float64)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-14)


def test_vrm_is_the_weighted_sum_of_both_graphs():
    a, b, d, e = _views()
    weights = torch.tensor([0.1, 1, 0.5, 0, 0.3], dtype=torch.float64)
    z = [standardised(view) for view in (a, b, d, e)]
    samples = sample_relation_loss(*z, sample_weights=weights)
    classes = class_relation_loss(
        torch.cat(z[:2]), torch.cat(z[2:]), sample_weights=weights.repeat(2)
    )
    value = VRMLoss(sample_weight=3.0, class_weight=2.0)(
        _kinds(a, b), _kinds(d, e), None, TeacherWeights(weights)
    )
    torch.testing.assert_close(value, 3 * samples + 2 * classes)


def test_real_edges_ask_for_no_view_and_ignore_one():
    a, b, d, e = _views()
    loss, weights = VRMLoss(edges="real"), torch.ones(5)
    assert loss.needs == loss.reads == (Logits(),)
    assert VRMLoss().needs == (Logits(), VirtualLogits(0))
    alone = loss({Logits(): a}, {Logits(): d}, None, TeacherWeights(weights))
    torch.testing.assert_close(
        loss(_kinds(a, b), _kinds(d, e), None, TeacherWeights(weights)), alone
    )
    expected = sample_relation_loss(standardised(a), None, standardised(d), None, edges="real")
    expected += 0.25 * class_relation_loss(standardised(a), standardised(d))
    torch.testing.assert_close(alone, expected)


def test_without_any_graph_there_is_no_loss():
    a, b, d, e = _views()
    value = vrm_loss(a.requires_grad_(), b, d, e, sample_weight=0.0, class_weight=0.0)
    value.backward()
    assert value == 0
    assert (a.grad == 0).all()


def test_view_discrepancy_prunes_the_edges_between_inconsistent_samples():
    a, b, d, e = _views()
    b = a + 0.01 * b
    b[2] = -a[2]
    whole = vrm_loss(a, b, d, e, class_weight=0.0)
    pruned = vrm_loss(a, b, d, e, class_weight=0.0, pruning="view_discrepancy", rho=0.04)
    z = [standardised(view) for view in (a, b, d, e)]
    edge = sample_relation_loss(*(view[2:3] for view in z))  # 1 of 25: the sample with itself
    torch.testing.assert_close(24 * pruned, 25 * whole - edge)
