"""Teachers that know different classes: each class is asked of those that know it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.distillation.objective import Objective, Term
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, fit_rules
from fedkd.fusion.entropy import relative_entropy
from fedkd.knowledge.kinds import DensityRatio, Logits
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Teacher, fuse, not_finite
from fedkd.knowledge.store import KnowledgeStore
from fedkd.losses import LOSSES

KNOWS = ((True, True, False, False), (False, False, True, True), (True, False, False, True))
SIZES = (30, 10, 20)


def bank(samples: int = 5) -> Bank:
    generator = torch.Generator().manual_seed(0)
    return Bank.of(
        [
            Knowledge(
                Teacher(number, size, knows=knows),
                {
                    Logits(): torch.randn(samples, sum(knows), generator=generator),
                    DensityRatio(): torch.rand(samples, generator=generator),
                },
            )
            for number, (size, knows) in enumerate(zip(SIZES, KNOWS, strict=True))
        ]
    )


def test_what_a_teacher_knows_outlives_the_server(tmp_path: Path) -> None:
    store = KnowledgeStore(tmp_path)
    answers = {Logits(): torch.zeros(3, 2)}
    store.put(Knowledge(Teacher(4, knows=KNOWS[2]), answers))
    store.put(Knowledge(Teacher(5), {Logits(): torch.zeros(3, 4)}))
    found = KnowledgeStore(tmp_path).bank((Logits(),))
    assert [teacher.knows for teacher in found.teachers] == [KNOWS[2], None]
    assert found.rows(slice(0, 3)).logits.shape == (2, 3, 4)


def everything(given: Bank) -> Ensemble:
    return given.rows(slice(0, given.num_samples))


def test_a_bank_says_nothing_of_what_a_teacher_does_not_know() -> None:
    item = everything(bank())
    assert item.logits.shape == (3, 5, 4)
    assert torch.equal(item.logits.isneginf(), ~torch.tensor(KNOWS)[:, None].expand(3, 5, 4))
    assert bank().num_classes == 4
    assert not_finite(item) is None
    broken = bank()
    broken.arrays[Logits()][1][2, 0] = np.inf
    assert "teacher 1 gives inf as logits for image 2" in str(not_finite(everything(broken)))


@pytest.mark.parametrize("by_size", [True, False])
def test_the_formula(by_size: bool) -> None:
    item = everything(bank())
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(4))
    item = item.weighted(weights)
    rule = FUSIONS.create("specialists", mine="earlier", by_size=by_size)
    found = rule(item).mean_probabilities()
    n = SIZES if by_size else (1, 1, 1)
    for b in range(5):
        q = [torch.softmax(bank().rows(slice(0, 5)).logits[k, b], 0) for k in range(3)]
        p = [
            sum(float(weights[k, b]) * n[k] * float(q[k][c]) for k in range(3) if KNOWS[k][c])
            / sum(n[k] for k in range(3) if KNOWS[k][c])
            for c in range(4)
        ]
        assert found[b].tolist() == pytest.approx([value / sum(p) for value in p], rel=1e-4)


def test_what_is_mine_by_likeness_and_by_how_sure_a_teacher_is() -> None:
    context = FitContext(bank())
    item = everything(context.bank)
    likeness = fit_rules([FUSIONS.create("density_ratio", by_size=False)], context)[0]
    sure = item.weighted(1 - relative_entropy(item))
    for mine, before in (("density_ratio", likeness(item)), ("entropy", sure)):
        (rule,) = fit_rules([FUSIONS.create("specialists", mine=mine)], context)
        again = FUSIONS.create("specialists", mine="earlier")(before)
        assert torch.allclose(rule(item).mean_probabilities(), again.mean_probabilities())


def test_sureness_is_of_the_classes_that_a_teacher_knows() -> None:
    flat = Bank.of([Knowledge(Teacher(0, knows=KNOWS[0]), {Logits(): torch.zeros(2, 2)})])
    assert relative_entropy(everything(flat))[0].tolist() == pytest.approx([1.0, 1.0])


def test_a_class_is_not_likelier_because_more_teachers_know_it() -> None:
    flat = [
        Knowledge(Teacher(n, knows=knows), {Logits(): torch.zeros(1, sum(knows))})
        for n, knows in enumerate([(True, True, False), (True, False, True), (True, True, False)])
    ]
    together = fuse(Bank.of(flat), [FUSIONS.create("uniform")]).probabilities
    assert together[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_padding_takes_unknown_for_an_even_chance() -> None:
    item = everything(bank())
    found = FUSIONS.create("padded")(item)
    padded = torch.where(item.logits.isneginf(), 0.0, item.logits)
    assert torch.allclose(found.logits[0], padded.mean(0))


RIGHT = {
    "uniform",
    "sample_count",
    "entropy",
    "density_ratio",
    "class_gated",
    "specialists",
    "padded",
}


@pytest.mark.parametrize("name", FUSIONS.names())
def test_every_rule_does_right_or_refuses_by_name(name: str) -> None:
    context = FitContext(bank(), labels=torch.zeros(5, dtype=torch.int64))
    if name not in RIGHT:
        with pytest.raises(ValueError, match=f"fusion '{name}' takes every teacher to know every"):
            fit_rules([FUSIONS.create(name)], context)
        return
    counted = Bank(
        tuple(Teacher(t.number, t.num_examples, tuple(5 * k for k in KNOWS[t.number]),
                      knows=t.knows) for t in context.bank.teachers),
        context.bank.arrays,
    )  # fmt: skip
    rules = fit_rules([FUSIONS.create(name)], FitContext(counted))
    found = fuse(counted, rules)
    assert torch.allclose(found.probabilities.sum(1), torch.ones(5), atol=1e-5)
    # What nobody knows has no chance, whatever the rule.
    two = counted.only([0])
    if name != "padded":
        rules = fit_rules([FUSIONS.create(name)], FitContext(two))
        assert float(fuse(two, rules).probabilities[:, 2:].max()) <= 1e-6


def test_after_specialists_every_rule_may_follow() -> None:
    chain = [FUSIONS.create("specialists", mine="earlier"), FUSIONS.create("era")]
    together = fuse(bank(), fit_rules(chain, FitContext(bank()))).probabilities
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_does_right_or_refuses_by_name(name: str) -> None:
    loss = LOSSES.create(name)
    objective = Objective([Term(name, loss)])
    if not loss.partial and any(kind.by_class for kind in loss.needs):
        with pytest.raises(ValueError, match=f"loss '{name}' takes every teacher to know every"):
            objective.adapt({}, everything(bank()), 0)
    else:
        objective.check_partial()
        assert name == "subset_kd" or Logits() not in loss.needs


def test_the_student_learns_among_each_teachers_classes_in_the_objective() -> None:
    item = everything(bank())
    objective = Objective([Term("subset_kd", LOSSES.create("subset_kd", temperature=1.0))])
    student = torch.zeros(5, 4, requires_grad=True)
    objective.adapt({Logits(): student.detach()}, item, 0)
    value = objective({Logits(): student}, item, None, 1, 1).total
    own = [torch.softmax(item.logits[k][:, list(KNOWS[k])], 1) for k in range(3)]
    expected = sum(math.log(2) + (q * q.log()).sum(1).mean() for q in own) / 3
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)
