"""Densely guided distillation: official numbers, dropped teachers."""

import pytest
import torch

from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.dgkd import dgkd_loss
from fedkd.losses.kd import kd_loss
from tests.golden.published import published, repeats

GOLDEN = published("multi_teacher")
_inputs = GOLDEN.answers
PUBLISHED = {"reduction": "elementwise", "combine": "sum"}


def _ensemble(teachers):
    count, size, _ = teachers.shape
    weights = torch.full((count, size), 1 / count, dtype=teachers.dtype)
    return Ensemble(tuple(map(Teacher, range(count))), {Logits(): teachers}, weights)


@pytest.mark.parametrize("temperature", [5, 10])
def test_dgkd_repeats_the_official_code(temperature):
    case = GOLDEN["official"][f"dgkd_lam1_T{temperature}_nodrop"]
    student, teachers = _inputs()
    value = dgkd_loss(student, teachers, temperature=temperature, **PUBLISHED).mean()
    repeats(case, value, student, rel=1e-12, rtol=1e-10, atol=1e-15)


def test_dgkd_repeats_the_official_code_less_one_teacher():
    student, teachers = _inputs()
    pairs = ([0, 1], [0, 2], [1, 2])
    values = sorted(dgkd_loss(student, teachers, kept=p, **PUBLISHED).mean().item() for p in pairs)
    expected = sorted(GOLDEN["official"]["dgkd_drop1_possible_values"]["value"])
    assert values == pytest.approx(expected, abs=1e-11)


def test_the_term_draws_one_of_these_each_time_it_trains():
    student, teachers = _inputs()
    loss, ensemble = LOSSES.create("dgkd", drop=1, **PUBLISHED), _ensemble(teachers)
    torch.manual_seed(0)
    seen = {round(loss({Logits(): student}, ensemble, None).mean().item(), 9) for _ in range(40)}
    expected = GOLDEN["official"]["dgkd_drop1_possible_values"]["value"]
    assert sorted(seen) == pytest.approx(sorted(expected), abs=1e-8)
    loss.eval()
    whole = GOLDEN["official"]["dgkd_lam1_T5_nodrop"]["value"]
    assert loss({Logits(): student}, ensemble, None).mean().item() == pytest.approx(whole)


def test_the_mean_is_over_those_kept_and_the_sum_counts_teachers():
    student, teachers = _inputs()
    each = torch.stack([kd_loss(student, teacher, temperature=5.0) for teacher in teachers])
    torch.testing.assert_close(dgkd_loss(student, teachers), each.mean(dim=0))
    torch.testing.assert_close(dgkd_loss(student, teachers, combine="sum"), each.sum(dim=0))
    torch.testing.assert_close(dgkd_loss(student, teachers, kept=[0, 2]), each[[0, 2]].mean(dim=0))
    elementwise = dgkd_loss(student, teachers, reduction="elementwise")
    torch.testing.assert_close(elementwise, each.mean(dim=0) / 6)


def test_at_least_one_teacher_is_kept_by_drop_and_sometimes_none_by_survival():
    student, teachers = _inputs()
    readings, ensemble = {Logits(): student}, _ensemble(teachers)
    torch.manual_seed(0)
    dropping, surviving = LOSSES.create("dgkd", drop=9), LOSSES.create("dgkd", survival=0.3)
    assert all((dropping(readings, ensemble, None) > 0).all() for _ in range(10))
    values = [surviving(readings, ensemble, None) for _ in range(40)]
    assert any((value == 0).all() for value in values)
    for value in values:
        (gradient,) = torch.autograd.grad(value.mean(), student)
        assert gradient.isfinite().all()


def test_as_many_survive_as_asked():
    torch.manual_seed(0)
    loss = LOSSES.create("dgkd", survival=0.75)
    share = sum(len(loss._draw(100)) for _ in range(100)) / 10**4
    assert share == pytest.approx(0.75, abs=0.02)
    assert len(LOSSES.create("dgkd", survival=1.0)._draw(100)) == 100
