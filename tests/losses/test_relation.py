"""The general relation loss holds the special ones: same numbers, same gradients."""

import pytest
import torch

from fedkd.knowledge.kinds import Logits, Pooled, VirtualLogits
from fedkd.losses import LOSSES
from fedkd.losses.base import TeacherWeights
from fedkd.losses.dist import dist_loss
from fedkd.losses.relation import relation_loss
from fedkd.losses.rkd import rkd_loss
from fedkd.losses.sp import sp_loss
from fedkd.losses.vrm import vrm_loss
from tests.losses.contract import draw, rand


def _views(size=6, classes=5):
    """Real and virtual logits of the student, then the teacher's."""
    a, b, d, e = draw(4, size, classes)
    return a.requires_grad_(), b.requires_grad_(), d, e


def _same(general, special, *tensors):
    torch.testing.assert_close(general, special, rtol=1e-10, atol=1e-14)
    found = [torch.autograd.grad(v, tensors, allow_unused=True) for v in (general, special)]
    for got, expected in zip(*found, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


WEIGHTS = pytest.mark.parametrize(
    "weights", [{}, {"weights": rand(6), "class_weights": rand(5, seed=2)}], ids=["even", "own"]
)

SPECIAL = {
    "rkd_distances": (
        lambda a, d, w: rkd_loss(a, d, distance_weight=1, angle_weight=0, **w),
        {"relation": "distance", "normalisation": "mean", "distance": "smooth_l1"},
    ),
    "rkd_squared_distances": (
        lambda a, d, w: rkd_loss(a, d, distance_weight=1, angle_weight=0, squared=True, **w),
        {"relation": "squared_distance", "normalisation": "mean", "distance": "smooth_l1"},
    ),
    "rkd_angles": (
        lambda a, d, w: rkd_loss(a, d, distance_weight=0, angle_weight=1, **w),
        {"relation": "angle", "distance": "smooth_l1"},
    ),
    "sp": (
        lambda a, d, w: sp_loss(a, d, **w),
        {"relation": "gram", "normalisation": "rows", "distance": "squared"},
    ),
    "dist_inter": (
        lambda a, d, w: dist_loss(a, d, gamma=0, tau_sq=False, **w),
        {"space": "probabilities", "relation": "identity", "distance": "pearson"},
    ),
}


@WEIGHTS
@pytest.mark.parametrize("name", SPECIAL)
def test_relations_of_samples(name, weights):
    a, _, d, _ = _views()
    special, options = SPECIAL[name]
    teacher_weights = {key: value for key, value in weights.items() if key == "weights"}
    _same(relation_loss(a, d, **options, **teacher_weights), special(a, d, teacher_weights), a)


@WEIGHTS
def test_dist_between_classes(weights):
    a, _, d, _ = _views()
    options = {"space": "probabilities", "relation": "identity", "distance": "pearson"} | weights
    general = relation_loss(a, d, vertices="classes", temperature=2.0, **options)
    _same(4 * general, dist_loss(a, d, beta=0, temperature=2.0, **weights), a)


@WEIGHTS
@pytest.mark.parametrize(
    "options",
    [
        {"distance": "cosine", "delta": 1.0, "reduction": "edges", "standardise": True},
        {"distance": "huber", "delta": 0.1, "reduction": "elements", "standardise": False},
    ],
    ids=["cosine", "huber"],
)
def test_vrm(options, weights):
    a, b, d, e = _views()
    options = options | weights
    direction = {"relation": "direction"} | options
    both = {"vertices": "samples_and_views"} | direction
    for edges, general in [
        ("real_virtual", relation_loss(a, d, b, e, edges="between_views", **both)),
        ("full", relation_loss(a, d, b, e, **both)),
        ("real", relation_loss(a, d, vertices="samples", **direction)),
    ]:
        _same(general, vrm_loss(a, b, d, e, class_weight=0.0, edges=edges, **options), a, b)
    classes = {"sample_weight": 0.0, "class_weight": 1.0} | options
    general = relation_loss(a, d, b, e, vertices="classes_over_views", **direction)
    _same(general, vrm_loss(a, b, d, e, **classes), a, b)
    general = relation_loss(a, d, vertices="classes", **direction)
    _same(general, vrm_loss(a, b, d, e, edges="real", **classes), a, b)


def test_half_the_squared_directions_are_one_less_their_cosine():
    a, _, d, _ = _views()
    cosine = relation_loss(a, d, relation="direction", distance="cosine")
    _same(relation_loss(a, d, relation="direction", distance="squared"), 2 * cosine, a)


def test_features_of_different_widths():
    a, _, d, _ = _views()
    for relation in ("distance", "gram", "angle"):
        assert relation_loss(a, d[:, :3], relation=relation, space="features") > 0
    with pytest.raises(ValueError, match="compares vectors of one length, got 5 and 3"):
        relation_loss(a, d[:, :3], relation="direction", space="features")


def test_needs_follow_from_space_and_vertices():
    for options, needs in [
        ({}, (Logits(),)),
        ({"space": "features"}, (Pooled(),)),
        ({"vertices": "classes_over_views"}, (Logits(), VirtualLogits(0))),
    ]:
        loss = LOSSES.create("relation", **options)
        assert loss.needs == loss.reads == needs
        a, b, d, e = _views()
        student, teacher = dict(zip(needs, (a, b))), dict(zip(needs, (d, e)))
        value = loss(student, teacher, None, TeacherWeights(torch.ones(6)))
        pairs = (a, d, b, e) if len(needs) == 2 else (a, d)
        torch.testing.assert_close(value, relation_loss(*pairs, **options))


def test_what_does_not_go_together_is_refused():
    for options, message in [
        ({"distance": "cosine"}, "relation 'distance' is a number; possible: distance smooth_l1"),
        ({"space": "features", "vertices": "classes"}, "no vertices 'classes'; possible: samples"),
        ({"space": "probabilities", "standardise": True}, "possible: space 'logits'"),
        ({"relation": "gram", "normalisation": "mean"}, "possible: none"),
        ({"relation": "angle", "normalisation": "rows"}, "'angle' has no rows"),
        ({"edges": "between_views"}, "possible: vertices samples_and_views"),
        ({"relation": "identity", "reduction": "edges"}, "possible: mean"),
        ({"reduction": "elements"}, "has no elements; possible: mean, edges"),
    ]:
        with pytest.raises(ValueError, match=message):
            LOSSES.create("relation", **options)


def test_a_missing_view_is_named():
    a, _, d, _ = _views()
    with pytest.raises(ValueError, match="vertices 'classes_over_views' need a virtual view"):
        relation_loss(a, d, vertices="classes_over_views")
