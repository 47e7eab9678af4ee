"""The mixture of experts: who could have had the image decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.fusion.base import FitContext, fit_rules
from fedkd.fusion.density_ratio import DensityRatio, limited
from fedkd.knowledge import kinds
from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Teacher, fuse


def _bank(scores: Tensor, sizes: list[int | None], logits: Tensor | None = None) -> Bank:
    teachers, samples = scores.shape
    logits = torch.zeros(teachers, samples, 2) if logits is None else logits
    kind = DensityRatio().kind
    return Bank.of(
        [
            Knowledge(Teacher(m, sizes[m]), {Logits(): logits[m], kind: scores[m]})
            for m in range(teachers)
        ]
    )


def _weights(bank: Bank, rule: DensityRatio) -> Tensor:
    [ready] = fit_rules([rule], FitContext(bank))
    ensemble = bank.rows(torch.arange(bank.num_samples))
    after = ready(ensemble)
    assert isinstance(after, Ensemble)
    return after.weights


def test_weights_are_bayes_rule() -> None:
    """Two teachers of 100 and 300 images; ratios of mean one: p(m|x) = n_m r_m / sum."""
    scores = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.5, 1.0]])
    weights = _weights(_bank(scores, [100, 300]), DensityRatio())
    assert weights[0].tolist() == pytest.approx([200 / 350, 0.0, 100 / 400])


def test_without_sizes_nobody_has_to_tell_them() -> None:
    rule = DensityRatio(by_size=False)
    scores = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.5, 1.0]])
    weights = _weights(_bank(scores, [None, None]), rule)
    assert rule.discloses == ()
    assert weights[0].tolist() == pytest.approx([0.8, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"client 0.*by_size: false"):
        _weights(_bank(scores, [None, None]), DensityRatio())


def test_who_claims_to_know_everything_gains_nothing() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])
    boast = scores * torch.tensor([[1e4], [1.0]])
    rule = DensityRatio(by_size=False)
    assert torch.allclose(
        _weights(_bank(scores, [1, 1]), rule), _weights(_bank(boast, [1, 1]), rule)
    )


def test_a_sample_familiar_to_nobody_and_a_teacher_familiar_with_nothing() -> None:
    scores = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    weights = _weights(_bank(scores, [5, 5]), DensityRatio())
    assert weights.tolist() == [[0.5, 1.0], [0.5, 0.0]]


def test_teachers_who_know_one_half_each_answer_as_one_who_knows_all() -> None:
    """Each is sure of nonsense outside its own half; their mean is wrong, the mixture is right."""
    truth = torch.tensor([0, 0, 1, 1])
    right = 8.0 * torch.nn.functional.one_hot(truth, 2).float()
    logits = torch.stack([right, right])
    logits[0, 2:] = torch.tensor([9.0, 0.0])
    logits[1, :2] = torch.tensor([0.0, 9.0])
    bank = _bank(torch.tensor([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]]), [7, 7], logits)
    assert fuse(bank, []).targets.tolist() != truth.tolist()
    rules = fit_rules([DensityRatio()], FitContext(bank))
    assert fuse(bank, rules).targets.tolist() == truth.tolist()


def test_options_are_checked_and_name_the_kind() -> None:
    assert DensityRatio(components=20, bandwidth=0.5).needs == (kinds.DensityRatio(20, 0.5),)
    with pytest.raises(ValueError, match="bandwidth"):
        DensityRatio(bandwidth=0.0)


def test_a_root_travels_and_eight_bits_then_keep_small_ratios_apart() -> None:
    scores = torch.tensor([[60.0, 0.3, 0.02], [30.0, 0.05, 0.1]])
    plain, rooted = DensityRatio(by_size=False), DensityRatio(by_size=False, root=2)
    assert rooted.kind.ratios(scores.sqrt()).allclose(scores)
    want = _weights(_bank(scores, [None, None]), plain)

    def received(kind: kinds.DensityRatio) -> Tensor:
        codec = CODECS.create("int")
        sent = [(row ** (1 / kind.root)).numpy() for row in scores]
        rows = [codec.decode(codec.encode(row), row.shape) for row in sent]
        return kind.ratios(torch.from_numpy(np.stack(rows)))

    def error(rule: DensityRatio) -> float:
        found = _weights(_bank(received(rule.kind), [None, None]), plain)
        return float((found - want).abs().max())

    assert error(rooted) < 0.05 < error(plain)


def test_limited_claims_are_those_of_bisection() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = 8 * torch.rand(7, 50, generator=generator) ** 3
    shares = torch.rand(7, generator=generator)
    shares /= shares.sum()
    found = limited(ratios, shares, 1.0)
    for image in range(50):
        low, high = 0.0, float(ratios[:, image].max())
        for _ in range(60):
            level = (low + high) / 2
            above = float(shares @ ratios[:, image].clamp(max=level)) > 1
            low, high = (low, level) if above else (level, high)
        assert torch.allclose(found[:, image], ratios[:, image].clamp(max=high), atol=1e-5)
    assert torch.equal(found[:, found.eq(ratios).all(0)], ratios[:, found.eq(ratios).all(0)])


def test_who_claims_some_images_above_all_does_not_drown_out_the_others() -> None:
    """One of four puts all its density on one image of ten."""
    scores = torch.ones(4, 10)
    scores[3] = 1e-3
    scores[3, 0] = 1e3
    free = DensityRatio(by_size=False)
    bound = DensityRatio(by_size=False, limit=1.0)
    bank = _bank(scores, [None] * 4)
    assert float(_weights(bank, free)[3, 0]) > 0.75
    assert float(_weights(bank, bound)[3, 0]) == pytest.approx(0.25, abs=0.01)
    even = _bank(torch.ones(4, 10), [None] * 4)
    assert torch.equal(_weights(even, free), _weights(even, bound))
