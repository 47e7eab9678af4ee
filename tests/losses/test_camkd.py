"""Weights by who is right: official numbers of both parts, projections, classifiers."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Classifier, Logits, Pooled, Stage
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.camkd import camkd_feature_loss, camkd_loss, confidence_weights
from tests.golden.published import published, repeats
from tests.losses.contract import small_network

GOLDEN = published("multi_teacher")
TARGETS = torch.tensor(GOLDEN["inputs"]["targets"])


def _tensor(name, dtype=torch.float64):
    return torch.tensor(GOLDEN["inputs"][name], dtype=dtype)


def _teachers(dtype=torch.float64):
    return GOLDEN.answers(dtype)[1]


def test_confidence_weights_repeat_the_official_code():
    expected = torch.tensor(GOLDEN["derived"]["camkd_weight"], dtype=torch.float64)
    torch.testing.assert_close(
        confidence_weights(_teachers(), TARGETS), expected, rtol=1e-12, atol=0
    )


def test_the_published_scale_divides_by_the_number_of_teachers():
    student, teachers = _tensor("logits_s"), _teachers()
    published = camkd_loss(student, teachers, TARGETS, scale="published")
    torch.testing.assert_close(published * 3, camkd_loss(student, teachers, TARGETS))


def _maps():
    ours = [_tensor(f"mt_feat_s{k}").requires_grad_() for k in (1, 2, 3)]
    return ours, [_tensor(f"mt_feat_t{k}") for k in (1, 2, 3)]


def test_the_feature_part_repeats_the_official_code():
    case = GOLDEN["official"]["camkd_inter_loss"]
    ours, theirs = _maps()
    value = camkd_feature_loss(ours, theirs, _teachers(), TARGETS, scale="published").mean()
    repeats(case, value, ours[0], rel=1e-12, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("through", [False, True])
def test_the_feature_part_differentiates_by_the_answers_as_published_if_asked(through):
    ours, theirs = _maps()
    answers = _teachers().requires_grad_()
    value = camkd_feature_loss(ours, theirs, answers, TARGETS, through_weights=through)
    gradient = torch.autograd.grad(value.sum(), answers, allow_unused=True)[0]
    if not through:
        assert gradient is None
        return
    errors = torch.stack([F.cross_entropy(a, TARGETS, reduction="none") for a in answers])
    weight = (1 - errors.softmax(dim=0)) / 2
    squares = torch.stack([((a - b) ** 2).flatten(1).mean(dim=1) for a, b in zip(ours, theirs)])
    (expected,) = torch.autograd.grad((weight * squares).sum(), answers)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)


def test_a_teacher_surely_wrong_gets_nothing_from_two_and_half_of_three():
    right, wrong = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    target = torch.tensor([0])
    assert confidence_weights(torch.stack([right, wrong]), target)[:, 0].tolist() == [1, 0]
    three = confidence_weights(torch.stack([right, wrong, right]), target)
    assert three[:, 0].tolist() == [0.5, 0, 0.5]


# -- the term -----------------------------------------------------------------------------------


def _batch(loss, widths=(8, 6), size=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 1, 16, 16), generator=generator, dtype=torch.uint8)
    readings = [extract(small_network(width, 5), images, loss.needs) for width in widths]
    student = extract(small_network(4, 5), images, loss.reads)
    tensors = {kind: [teacher[kind] for teacher in readings] for kind in loss.needs}
    tensors[Logits()] = torch.stack(tensors[Logits()])
    weights = torch.full((len(widths), size), 1 / len(widths))
    return student, readings, Ensemble(tuple(map(Teacher, range(len(widths)))), tensors, weights)


def test_the_term_projects_for_each_teacher_and_asks_its_classifier():
    torch.manual_seed(0)
    loss = LOSSES.create("camkd", feature_weight=50.0, temperature=2.0)
    assert loss.needs == (Logits(), Stage(-1), Classifier())
    assert loss.reads == (Logits(), Stage(-1))
    student, readings, ensemble = _batch(loss)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    fitted = loss.adapted(student, readings)
    assert not list(loss.parameters())
    assert len(fitted.projectors) == 2
    fitted.eval()
    value = fitted(student, ensemble, targets)
    value.mean().backward()
    assert all(p.grad is not None for p in fitted.projectors.parameters())

    projected = [project(student[Stage(-1)]) for project in fitted.projectors]
    heads = [small_network(width, 5).head for width in (8, 6)]
    answers = torch.stack([h(p.mean(dim=(2, 3))) for h, p in zip(heads, projected)])
    maps = [teacher[Stage(-1)] for teacher in readings]
    logits = torch.stack([teacher[Logits()] for teacher in readings])
    expected = camkd_loss(student[Logits()], logits, targets, temperature=2.0)
    expected = expected + 50 * camkd_feature_loss(projected, maps, answers, targets)
    torch.testing.assert_close(value, expected)


def test_the_parts_can_be_terms_of_their_own():
    student, readings, ensemble = _batch(LOSSES.create("camkd", feature_weight=2.0))
    targets = torch.zeros(6, dtype=torch.long)

    def value(**options):
        torch.manual_seed(0)
        loss = LOSSES.create("camkd", **options).adapted(student, readings)
        return loss.eval()(student, ensemble, targets)

    both = value(feature_weight=2.0)
    parts = value() + 2 * value(logit_weight=0.0, feature_weight=1.0)
    torch.testing.assert_close(both, parts)


@pytest.mark.parametrize("convs", [False, True])
def test_projections_end_in_relu_only_where_the_teacher_is_not_negative(convs):
    loss = LOSSES.create("camkd", feature_weight=1.0, convs=convs, factor=4)
    student, readings, _ = _batch(loss)
    readings[1][Stage(-1)] -= 1
    assert [p.relu for p in loss.adapted(student, readings).projectors] == [True, False]
    loss = LOSSES.create("camkd", feature_weight=1.0, relu=True)
    assert [p.relu for p in loss.adapted(student, readings).projectors] == [True, True]


def test_a_classifier_that_does_not_fit_the_map_is_refused():
    loss = LOSSES.create("camkd", feature_weight=1.0)
    student, readings, _ = _batch(loss)
    readings[1][Classifier()] = torch.zeros(5, 100)
    with pytest.raises(ValueError, match="loss 'camkd': a teacher's classifier takes 99 numbers"):
        loss.adapted(student, readings)


def test_the_classifier_gives_the_logits_of_the_pooled_features():
    images = torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    network = copy.deepcopy(small_network(8, 5))
    readings = extract(network, images, (Logits(), Pooled(), Classifier()))
    classifier = readings[Classifier()]
    assert not classifier.requires_grad
    logits = F.linear(readings[Pooled()], classifier[:, :-1], classifier[:, -1])
    torch.testing.assert_close(logits, readings[Logits()])
    network.head.bias = None
    without = extract(network, images, (Classifier(),))[Classifier()]
    assert (without[:, -1] == 0).all()
