"""Confusions are learnt from all answers, and where a teacher confuses it is not followed."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.fusion.base import FitContext, fit_rules
from fedkd.fusion.dawid_skene import DawidSkene
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Teacher

CLASSES, SAMPLES = 4, 400
TRUTH = torch.arange(SAMPLES) % CLASSES


def _answers(answers: list[Tensor]) -> Bank:
    """Teachers that are rather sure of these classes."""
    logits = [4.0 * torch.nn.functional.one_hot(a, CLASSES).float() for a in answers]
    return Bank.of([Knowledge(Teacher(m), {Logits(): t}) for m, t in enumerate(logits)])


def _fused(bank: Bank, rule: DawidSkene | None) -> Ensemble:
    rules = [] if rule is None else fit_rules([rule], FitContext(bank))
    ensemble = bank.rows(torch.arange(bank.num_samples))
    for ready in rules:
        after = ready(ensemble)
        assert isinstance(after, Ensemble)
        ensemble = after
    return ensemble


def _noisy(seed: int, right: float) -> Tensor:
    """Answers right with this probability, and otherwise any."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    kept = torch.rand(SAMPLES, generator=generator) < right
    return torch.where(kept, TRUTH, wrong)


def _right(ensemble: Ensemble, label: int | None = None) -> float:
    hit = ensemble.mean_probabilities().argmax(1) == TRUTH
    return float((hit if label is None else hit[label == TRUTH]).double().mean())


def test_confusion_matrices_are_found() -> None:
    swap = torch.where(TRUTH == 3, 1, TRUTH)  # calls every 3 a 1, and is right otherwise
    bank = _answers([_noisy(m, 0.7) for m in range(6)] + [swap])
    (ready,) = fit_rules([DawidSkene()], FitContext(bank))
    assert ready.confusion is not None
    found = ready.confusion.exp()
    assert torch.allclose(found.sum(-1), torch.ones(7, CLASSES))
    assert float(found[6, 3, 1]) > 0.85
    assert float(found[6, 2, 2]) > 0.85
    expected = 0.7 + 0.3 / CLASSES
    assert abs(float(torch.diagonal(found[0]).mean()) - expected) < 0.12


def _fitted(bank: Bank) -> DawidSkene:
    (ready,) = fit_rules([DawidSkene()], FitContext(bank))
    return ready


def _liars() -> Bank:
    """Three of ten call the 3s 1s with one voice; the honest seven err each in their own way."""
    lie = torch.where(TRUTH == 3, 1, TRUTH)
    return _answers([_noisy(m, 0.35) for m in range(7)] + [lie] * 3)


def test_a_minority_that_agrees_on_a_wrong_name_is_outweighed() -> None:
    """And is followed elsewhere."""
    alone, judged = _fused(_liars(), None), _fused(_liars(), DawidSkene(dependence=0.0))
    assert _right(alone, 3) < 0.7
    assert _right(judged, 3) > 0.85
    assert _right(judged, 1) > 0.85
    on_threes = judged.weights[7:, TRUTH == 3].sum(0).mean()
    elsewhere = judged.weights[7:, TRUTH == 0].sum(0).mean()
    assert float(on_threes) < 0.25 < float(elsewhere)


def test_who_err_together_count_as_one() -> None:
    """Three of ten are sure of one class on half of all images, drawn by lot, and right elsewhere;
    on these images two in five of the honest answers are right."""
    chosen = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(9)) < 0.5
    lie = torch.where(chosen, 1, TRUTH)
    bank = _answers([_noisy(m, 0.3) for m in range(7)] + [lie] * 3)
    ready = _fitted(bank)
    assert ready.independence is not None
    assert float(ready.independence[:7].min()) > 0.9
    assert float(ready.independence[7:].max()) < 0.15
    trusting, judged = _fused(bank, DawidSkene(dependence=0.0)), _fused(bank, DawidSkene())
    assert _right(trusting) < 0.68 < 0.74 < _right(judged)
    assert _right(_fused(_liars(), DawidSkene()), 3) > 0.85


def test_who_copies_an_honest_teacher_silences_that_one_at_most() -> None:
    bank = _answers([_noisy(m, 0.7) for m in range(7)] + [_noisy(0, 0.7)] * 3)
    judged = _fused(bank, DawidSkene())
    assert float(judged.weights[1:7].mean()) > 0.14
    assert _right(judged) > _right(_fused(bank, None))


def test_most_teachers_are_never_taken_for_one() -> None:
    """However alike they are, and whatever the others answer."""
    for count in range(3, 12):
        most = count // 2 + 1
        bank = _answers([_noisy(0, 0.6)] * most + [_noisy(1 + m, 0.3) for m in range(count - most)])
        found = _fitted(bank).independence
        assert found is not None
        assert float(found[:most].min()) == 1.0


def test_a_silent_teacher_and_a_single_one_depend_on_nobody() -> None:
    bank = _answers([_noisy(m, 0.7) for m in range(4)])

    def silent(ensemble: Ensemble) -> Ensemble:
        return ensemble.weighted(torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None])

    ready = fit_rules([silent, DawidSkene()], FitContext(bank))[-1]
    assert isinstance(ready, DawidSkene)
    assert ready.independence is not None
    assert float(ready.independence[3]) == 1.0
    assert _fitted(_answers([TRUTH])).independence.tolist() == [1.0]


def test_teachers_alike_keep_their_weights() -> None:
    bank = _answers([TRUTH] * 5)
    assert torch.allclose(_fused(bank, DawidSkene()).weights, torch.full((5, SAMPLES), 0.2))


def test_weights_of_the_rules_before_say_where_a_teacher_is_judged() -> None:
    """Who has no weight on an image is not judged by what it answers there."""
    narrow = torch.where(TRUTH < 2, TRUTH, 0)  # knows the first two classes only
    bank = _answers([_noisy(m, 0.7) for m in range(5)] + [narrow])

    def claims(ensemble: Ensemble) -> Ensemble:
        known = torch.ones_like(ensemble.weights)
        known[5] = (TRUTH < 2).float()
        return ensemble.weighted(known)

    confusions = []
    for before in ([], [claims]):
        ready = fit_rules([*before, DawidSkene()], FitContext(bank))[-1]
        assert isinstance(ready, DawidSkene)
        assert ready.confusion is not None
        confusions.append(ready.confusion.exp()[5])
    assert float(confusions[0][3, 0]) > 0.8
    assert float(confusions[1][3, 0]) < 0.3
    assert float(confusions[1][0, 0]) > 0.8
