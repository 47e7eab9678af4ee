"""Every fusion rule: what all must keep, and what each is for."""

import pytest
import torch

from fedkd.fusion import FUSIONS
from fedkd.knowledge.kinds import Familiarity, Logits
from fedkd.knowledge.payload import Ensemble, Teacher


def ensemble(samples: int = 7, classes: int = 4, scale: float = 3.0) -> Ensemble:
    generator = torch.Generator().manual_seed(0)
    teachers = tuple(
        Teacher(client, sum(counts), counts)
        for client, counts in enumerate([(50, 0, 0, 1), (0, 40, 3, 0), (5, 5, 5, 5)])
    )
    logits = scale * torch.randn(3, samples, classes, generator=generator)
    familiarity = torch.rand(3, samples, generator=generator)
    tensors = {Logits(): logits, Familiarity(): familiarity}
    return Ensemble(teachers, tensors, torch.full((3, samples), 1 / 3))


def reorder(item: Ensemble, order: list[int]) -> Ensemble:
    return Ensemble(
        tuple(item.teachers[i] for i in order),
        {kind: tensor[order] for kind, tensor in item.tensors.items()},
        item.weights[order],
    )


@pytest.fixture(params=FUSIONS.names())
def rule(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return FUSIONS.create(request.param)


def test_weights_sum_to_one(rule) -> None:  # type: ignore[no-untyped-def]
    for scale in (0.0, 3.0, 1e4):
        weights = rule(ensemble(scale=scale)).weights
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()
        assert torch.allclose(weights.sum(0), torch.ones(7), atol=1e-5)


def test_order_of_teachers_does_not_matter(rule) -> None:  # type: ignore[no-untyped-def]
    order = [2, 0, 1]
    one = rule(ensemble()).mean_probabilities()
    two = rule(reorder(ensemble(), order)).mean_probabilities()
    assert torch.allclose(one, two, atol=1e-6)


def test_each_sample_stands_alone(rule) -> None:  # type: ignore[no-untyped-def]
    whole = ensemble()
    part = Ensemble(
        whole.teachers, {k: t[:, 2:4] for k, t in whole.tensors.items()}, whole.weights[:, 2:4]
    )
    assert torch.allclose(rule(whole).weights[:, 2:4], rule(part).weights, atol=1e-6)


def test_silent_teachers_stay_silent(rule) -> None:  # type: ignore[no-untyped-def]
    some = ensemble()
    weights = torch.tensor([[0.0], [0.5], [0.5]]).expand(3, 7)
    after = rule(Ensemble(some.teachers, some.tensors, weights))
    assert (after.weights[0] == 0).all()


def test_sample_count_is_proportional_and_capped() -> None:
    weights = FUSIONS.create("sample_count")(ensemble()).weights[:, 0]
    assert torch.allclose(weights, torch.tensor([51.0, 43.0, 20.0]) / 114)
    greedy = ensemble()
    teachers = (Teacher(0, 10**9), *greedy.teachers[1:])
    liar = Ensemble(teachers, greedy.tensors, greedy.weights)
    capped = FUSIONS.create("sample_count", cap=2.0)(liar).weights[:, 0]
    assert torch.allclose(capped, torch.tensor([86.0, 43.0, 20.0]) / 149)


def test_entropy_listens_to_the_sure() -> None:
    logits = torch.tensor([[[9.0, 0, 0]], [[0.1, 0, 0]]])
    pair = Ensemble((Teacher(0), Teacher(1)), {Logits(): logits}, torch.full((2, 1), 0.5))
    weights = FUSIONS.create("entropy")(pair).weights[:, 0]
    assert weights[0] > 0.95


def test_class_gate_trusts_the_teacher_that_saw_the_class() -> None:
    """A teacher that saw one class calls everything so; it must not drown the one who knows."""
    teachers = (Teacher(0, 101, (100, 0, 1)), Teacher(1, 60, (0, 30, 30)))
    logits = torch.tensor([[[3.0, -6.0, 0.0]], [[-4.0, 0.0, 5.0]]])
    pair = Ensemble(teachers, {Logits(): logits}, torch.full((2, 1), 0.5))
    uniform = pair.mean_probabilities()
    gated = FUSIONS.create("class_gated")(pair)
    assert gated.weights[1, 0] > 0.7
    assert gated.mean_probabilities().argmax() == 2
    assert uniform[0, 0] > 0.4
    assert gated.class_weights is not None
    assert gated.class_weights[0, 1] == 0  # no say on a class it never saw


def test_class_gate_without_counts_is_an_error() -> None:
    blind = Ensemble((Teacher(0),), {Logits(): torch.zeros(1, 1, 3)}, torch.ones(1, 1))
    with pytest.raises(ValueError, match="class counts of client 0"):
        FUSIONS.create("class_gated")(blind)
