"""Shares of clients: axioms of the Shapley value, sampling, a run's clients."""

import json
import math

import pytest
import torch
from torch import Tensor

from fedkd.config import ConfigError
from fedkd.rounds import experiment_context
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.local import run_local
from fedkd.studies import contribution as measured
from fedkd.studies.contribution import sampled_shapley, shapley
from fedkd.studies.contribution_report import carried, write_page
from tests.conftest import Shared, Tiny

pytestmark = pytest.mark.usefixtures("lean")


def glove(coalition: frozenset[int]) -> Tensor:
    """Shapley's glove game: 0 and 1 hold left gloves, 2 a right one; a pair is worth 1."""
    pair = 2 in coalition and len(coalition) > 1
    return torch.tensor([float(pair), 2.0 * len(coalition)])


def test_glove_game() -> None:
    shares = shapley(3, glove)
    torch.testing.assert_close(
        shares.values[:, 0], torch.tensor([1 / 6, 1 / 6, 4 / 6], dtype=torch.double)
    )
    torch.testing.assert_close(shares.values[:, 1], torch.full((3,), 2.0, dtype=torch.double))
    assert shares.permutations == 0


def test_sampling_meets_the_exact_value_within_its_error() -> None:
    drawn = sampled_shapley(
        3, glove, permutations=400, generator=torch.Generator().manual_seed(0), tolerance=0
    )
    gap = (drawn.values - shapley(3, glove).values).abs()
    assert (gap <= 3 * drawn.errors + 1e-12).all()
    assert float(drawn.values[:, 0].sum()) == pytest.approx(1)
    assert (drawn.errors[:, 1] == 0).all()
    # A share of 1/6 that is 0 or 1 in every order: the error is that of a Bernoulli mean.
    assert float(drawn.errors[0, 0]) == pytest.approx(math.sqrt(5 / 36 / 400), rel=0.1)


def test_truncation_asks_less() -> None:
    asked: list[frozenset[int]] = []

    def first_is_all(coalition: frozenset[int]) -> Tensor:
        asked.append(coalition)
        return torch.tensor([float(len(coalition) > 0)])

    shares = sampled_shapley(
        6, first_is_all, permutations=10, generator=torch.Generator().manual_seed(0)
    )
    assert len(asked) == 2 + 10  # nobody, everybody, and the first of each order
    assert float(shares.values.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 2"):
        sampled_shapley(2, glove, permutations=1, generator=torch.Generator())


@pytest.fixture
def run(shared: Shared) -> RunDirectory:
    return shared("teachers.epochs=6")


def test_shares_add_up_and_influence_is_what_the_ensemble_loses(run: RunDirectory) -> None:
    space = experiment_context(run.experiment)
    facts = measured.contribution(run, space)
    rows = facts["clients"].values()
    gain = facts["everybody"]["accuracy"] - facts["nobody"]["accuracy"]
    assert sum(row["share"] for row in rows) == pytest.approx(gain)
    assert facts["nobody"]["accuracy"] == 0.25
    assert facts["nobody"]["log_likelihood"] == pytest.approx(-math.log(4))
    # Everybody's accuracy is what the run itself measured.
    assert facts["everybody"]["accuracy"] == run.events(RoundFinished)[-1].ensemble.accuracy
    _, value = measured.ensemble_game(run, space, 2)
    everybody = value(frozenset({0, 1, 2}))
    lost = everybody - value(frozenset({0, 2}))
    assert facts["clients"][1]["influence"] == pytest.approx(float(lost[0]))
    for c in range(4):
        total = sum(row["per_class"][c] for row in rows)
        assert total == pytest.approx(float(everybody[2 + c]) - 0.25)
    assert json.loads((run.path / "contribution.json").read_text())["rounds"] == [2]


def test_all_rounds_are_their_mean(tiny: Tiny) -> None:
    """Also if a rule measures the teachers on the server's labelled images."""
    rule = ("fusion=[learned_gate]", "data.validation=30")
    run = run_local(tiny(*rule))
    space = experiment_context(run.experiment)
    facts = measured.contribution(run, space, all_rounds=True)
    wholes = [r.ensemble.accuracy for r in run.events(RoundFinished)]
    assert facts["rounds"] == [1, 2]
    assert facts["everybody"]["accuracy"] == pytest.approx(sum(wholes) / 2)


def test_many_clients_are_sampled(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "EXACT_UP_TO", 2)
    space = experiment_context(run.experiment)
    first, second = (measured.contribution(run, space, permutations=5) for _ in range(2))
    assert first["permutations"] == 5
    assert first == second
    assert any(row["share_error"] > 0 for row in first["clients"].values())


def test_students_without_each_client_and_the_page(run: RunDirectory) -> None:
    space = experiment_context(run.experiment)
    measured.contribution(run, space)
    facts = measured.leave_one_out_students(run, space)
    assert [*facts["students"]["clients"]] == [0, 1, 2]
    whole = facts["students"]["accuracy"]
    assert whole == run.events(RoundFinished)[-1].student.accuracy
    for row in facts["students"]["clients"].values():
        assert row["influence"] == pytest.approx(whole - row["accuracy_without"])
    page = write_page(run, facts).read_text(encoding="utf-8")
    assert "without distilling again" in page
    assert page.count("<svg") == 2
    assert "student loses" in page


def test_a_run_without_test_answers_says_which_key(tiny: Tiny) -> None:
    run = run_local(tiny("evaluation.teachers=false", "rounds=1"))
    with pytest.raises(ConfigError, match=r"evaluation\.teachers"):
        measured.contribution(run, experiment_context(run.experiment))


def test_classes_are_carried_by_their_largest_share() -> None:
    facts = {
        "classes": ["cat", "dog"],
        "clients": {0: {"per_class": [0.4, 0.1]}, 1: {"per_class": [0.1, 0.3]}},
    }
    assert carried(facts, 0) == ["cat"]
    assert carried(facts, 1) == ["dog"]
