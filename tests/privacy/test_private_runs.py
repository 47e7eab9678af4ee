"""Whole runs under a budget: what is spent, what is reported, and what stays inside."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedkd.config import Component, ConfigError
from fedkd.io.tensors import load_state
from fedkd.privacy.accounting import Steps, epsilon
from fedkd.privacy.label_dp import keep_probability, randomised
from fedkd.privacy.ledger import LedgerBroken
from fedkd.privacy.plan import delta_of, plan
from fedkd.reporting.page import render
from fedkd.reporting.run_page import make_page
from fedkd.reporting.run_record import Found
from fedkd.reporting.run_tables import in_words
from fedkd.rounds import Client, ExperimentContext
from fedkd.rounds.client_files import ClientFiles
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientsAsked, ClientTrained, RoundFinished, Warned
from fedkd.runs.privacy_statement import statement
from fedkd.simulations.local import run_local
from tests.conftest import Shared, Tiny

pytestmark = pytest.mark.usefixtures("lean")

# What the tiny experiment says about private images beside its teachers' answers.
QUIET = (
    "teachers.models=[mlp]",
    "fusion=[entropy]",
    "evaluation.clients=false",
    "evaluation.baselines=[oracle]",
)
DP = "teachers.privacy={epsilon: 4.0, delta: 0.001, nominal_size: 40}"


def ledger_lines(run: RunDirectory, client: int) -> list[dict[str, object]]:
    path = run.clients / f"client-{client:04d}" / "privacy.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(shared: Shared) -> RunDirectory:
    return shared(DP, *QUIET, "rounds=3")


def test_a_private_run_spends_its_budget_over_all_rounds_and_says_so(run: RunDirectory) -> None:
    facts = run.read_json("privacy.json")
    assert facts["budget"] == 4.0
    assert 3.95 < facts["worst"] <= 4.0
    planned = plan(run.experiment)
    for client in range(3):
        mine = facts["clients"][str(client)]
        assert mine == {"epsilon": facts["worst"], "frozen_in": []}
        reserved = [
            Steps(**line["reserve"]) for line in ledger_lines(run, client) if "reserve" in line
        ]
        assert reserved == [planned.steps] * 3
        assert epsilon(reserved, 0.001, "prv") == mine["epsilon"]
    assert run.read_json("summary.json")["privacy"] == facts


@pytest.mark.parametrize(
    ("epsilon", "delta", "right"),
    [(0.0, 0.0, 50), (2.0, 0.0, 88.08), (1.0, 0.01, 73.37), (999, 0.5, 100)],
)
def test_an_epsilon_is_put_into_words(epsilon: float, delta: float, right: float) -> None:
    # 2: e^2 / (1 + e^2); 1 and 0.01: (e + 0.01) / (1 + e).
    assert in_words(epsilon, delta).endswith(f"in at most {right:g} of 100 cases")


def test_when_the_budget_ends_the_teacher_freezes_and_the_run_goes_on(tiny: Tiny) -> None:
    # Noise that the user set himself: too little of it for three rounds.
    two = tiny(DP, *QUIET, "rounds=2")
    planned = plan(two)
    noise = planned.mechanism.noise_multiplier
    run = run_local(tiny(DP, *QUIET, "rounds=3", f"teachers.privacy.noise_multiplier={noise}"))
    facts = run.read_json("privacy.json")
    assert facts["worst"] <= 4.0
    assert [facts["clients"][str(c)]["frozen_in"] for c in range(3)] == [[3]] * 3
    for client in range(3):
        folder = run.clients / f"client-{client:04d}"
        before, after = (load_state(folder / f"teacher-{n:04d}.pt")["weights"] for n in (2, 3))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert sum("reserve" in line for line in ledger_lines(run, client)) == 2
    # It went on answering, the student went on learning, with a warning.
    assert [r.status for r in run.events(RoundFinished)] == ["ok"] * 3
    warned = [w.text for w in run.events(Warned)]
    assert sum("budget of client" in text and "round 3" in text for text in warned) == 3
    page = render(make_page(Found(run)))
    assert "rounds without training" in page
    assert "all 3" in page


def test_a_budget_for_not_even_one_round_is_refused(tiny: Tiny) -> None:
    """Its clients would answer with teachers that were never trained."""
    few = "teachers.privacy={epsilon: 0.01, noise_multiplier: 0.5, delta: 0.001, nominal_size: 40}"
    with pytest.raises(
        ConfigError, match=r"teachers.privacy: a single round costs epsilon [\d.]+, "
    ):
        ExperimentContext(tiny(few, *QUIET, "rounds=1"))


def test_killed_in_training_the_client_pays_twice_and_stops_earlier(tiny: Tiny) -> None:
    experiment = tiny(DP, *QUIET, "rounds=3")
    run = RunDirectory.new(experiment)
    space = ExperimentContext(experiment)
    folder = run.clients / "client-0000"

    def client() -> Client:  # every time as a new process finds it
        return Client(space, 0, run.identity, folder)

    client().train(1)
    assert client().budget.reserve(2, ClientFiles(folder).latest(1))  # killed right after
    client().train(2)
    client().train(3)
    assert [client().budget.paid(n) for n in (1, 2, 3)] == [True, True, False]
    spent = client().budget.spent
    assert spent <= 4.0
    thrice = replace(space.plan.steps, count=3 * space.plan.steps.count)
    assert spent == epsilon([thrice], 0.001, "prv")


def test_a_round_that_is_asked_for_again_costs_nothing_more(tiny: Tiny) -> None:
    experiment = tiny(DP, *QUIET)
    run = RunDirectory.new(experiment)
    client = Client(ExperimentContext(experiment), 1, run.identity, run.clients / "client-0001")
    client.train(1)
    once = client.budget.spent
    client.train(1)
    client.answer("transfer", 1)
    client.answer("transfer", 1)
    assert client.budget.spent == once


def test_a_ledger_does_not_serve_other_images(tiny: Tiny) -> None:
    experiment = tiny(DP, *QUIET)
    run = RunDirectory.new(experiment)
    folder = run.clients / "client-0000"
    Client(ExperimentContext(experiment), 0, run.identity, folder).train(1)
    with pytest.raises(LedgerBroken, match="was opened for"):
        Client(ExperimentContext(experiment), 1, run.identity, folder).train(2)


def test_nothing_about_private_images_reaches_server_or_report(run: RunDirectory) -> None:
    trained = run.events(ClientTrained)
    assert {key for event in trained for key in event.facts()} == {
        "round", "client", "phase", "seconds", "epsilon", "trained",
    }  # fmt: skip
    summary = run.read_json("summary.json")
    assert "class_counts" not in summary
    assert {t["examples"] for t in summary["teachers"]} == {None}
    page = render(make_page(Found(run)))
    assert "Private images per client and class" not in page
    assert "stays with the client" in page


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fusion=[class_gated]", "fusion: 'class_gated' discloses"),
        ("fusion=[sample_count]", "fusion: 'sample_count' discloses"),
        ("fusion=[density_ratio]", "fusion"),
        ("evaluation.clients=true", "evaluation.clients"),
        ("evaluation.baselines=[ceiling]", "'ceiling'"),
        ("teachers.models=[{name: cnn_tiny, norm: batch}]", "norm"),
        ("teachers.privacy.delta=0.5", "teachers.privacy.delta"),
        ("teachers.privacy.epsilon=1e-12", "teachers.privacy: epsilon"),
    ],
)
def test_what_would_break_the_promise_is_refused_by_its_key(
    tiny: Tiny, override: str, words: str
) -> None:
    experiment = tiny(DP, *QUIET, override)
    with pytest.raises(ConfigError, match=words):
        ExperimentContext(experiment)


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ("{nominal_size: 40}", "needs epsilon or noise_multiplier"),
        ("{epsilon: 1.0}", "needs nominal_size"),
        ("{mechanism: label_dp, nominal_size: 40}", "needs epsilon and nothing else"),
        ("{epsilon: 1.0, nominal_size: 40, accountant: gdp}", "accountant"),
        ("{epsilon: 1.0, nominal_size: 40, mechanism: noisy_logits}", "mechanism"),
    ],
)
def test_an_incomplete_promise_is_refused(tiny: Tiny, privacy: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(f"teachers.privacy={privacy}")


def test_the_default_delta_is_far_below_one_over_the_size(tiny: Tiny) -> None:
    for size in (1, 40, 999, 1000, 5000):
        experiment = tiny(f"teachers.privacy={{epsilon: 1.0, nominal_size: {size}}}")
        assert 0.01 / size < delta_of(experiment.teachers.privacy) <= 0.1 / size * (1 + 1e-9)


def test_the_mechanism_is_the_same_whatever_a_client_holds(run: RunDirectory) -> None:
    data = ExperimentContext(run.experiment).data
    assert len({len(data.shard(c)) for c in range(3)}) > 1
    lines = [[e["reserve"] for e in ledger_lines(run, c) if "reserve" in e] for c in range(3)]
    assert lines[0] == lines[1] == lines[2]


def test_randomised_labels_keep_as_many_as_they_should() -> None:
    labels = torch.arange(10).repeat(4000)
    drawn = randomised(labels, 10, 2.0)
    keep = keep_probability(2.0, 10)
    assert (drawn == labels).double().mean().item() == pytest.approx(keep, abs=0.012)
    lies = torch.bincount(drawn[(labels == 3) & (drawn != 3)], minlength=10)
    assert lies[3] == 0
    assert (lies[[0, 1, 2, 4, 5, 6, 7, 8, 9]] > 100).all()
    # The likelihood ratio of any answer is at most e^epsilon: keep against one certain other.
    assert keep / ((1 - keep) / 9) == pytest.approx(torch.tensor(2.0).exp().item())


def test_label_dp_draws_once_and_trains_on_what_it_drew(tiny: Tiny, tmp_path: Path) -> None:
    experiment = tiny("teachers.privacy={mechanism: label_dp, epsilon: 1.0}", *QUIET)
    client = Client(ExperimentContext(experiment), 0, "run", tmp_path / "client-0000")
    first, again = client.budget.images(), client.budget.images()
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, client.context.data.shard(0).labels)
    run = run_local(experiment)
    facts = run.read_json("privacy.json")
    assert facts["worst"] == facts["budget"] == 1.0
    assert facts["delta"] == 0
    assert "not the image" in facts["protects"]


def test_a_release_has_its_statement_and_shows_no_single_teacher(tiny: Tiny) -> None:
    run = run_local(
        tiny(
            "release={name: gnmax, epsilon: 50.0, min_votes: 3, queries: 24}",
            "distillation.losses=[ce]",
            "evaluation.teachers=false",
            *QUIET,
            "fusion=[uniform]",
        )
    )
    facts = run.read_json("privacy.json")
    assert facts["worst"] == pytest.approx(50.0, rel=1e-6)
    assert "the server is trusted" in facts["assumes"]
    assert "promised is the budget" not in facts["how"]
    name = Component.model_validate({"name": "confident_gnmax", "epsilon": 50.0})
    checked: Any = SimpleNamespace(
        experiment=run.experiment.model_copy(update={"release": name}), events=run.events
    )
    facts = statement(checked)
    assert "promised is the budget" in facts["how"]
    trained = run.events(ClientTrained)
    assert {(event.loss, event.accuracy) for event in trained} == {(None, None)}
    assert "answers of single teachers are not released" in render(make_page(Found(run)))


def test_a_client_pays_for_the_rounds_that_ask_it(tiny: Tiny) -> None:
    drawn = (DP, *QUIET, "rounds=3", "federation.participation=1")
    run = run_local(tiny(*drawn))
    asked = [client for event in run.events(ClientsAsked) for client in event.asked]
    planned = plan(run.experiment)
    assert planned == plan(tiny(DP, *QUIET, "rounds=3"))  # the draw is no secret
    facts = run.read_json("privacy.json")
    assert facts["clients"] == {
        str(client): {"epsilon": epsilon([planned.steps] * asked.count(client), 0.001, "prv"),
                      "frozen_in": []}
        for client in sorted(set(asked))
    }  # fmt: skip
    for client in set(asked):
        reserved = [line for line in ledger_lines(run, client) if "reserve" in line]
        assert len(reserved) == asked.count(client)


def test_fixed_cohorts_need_less_noise(tiny: Tiny) -> None:
    def noise(*words: str) -> float:
        return plan(tiny(DP, *QUIET, *words)).mechanism.noise_multiplier

    cohorts = "federation.participation.sampler={name: schedule, cohorts: [[0, 1], [2], [1, 2]]}"
    assert noise("rounds=3", cohorts) == noise("rounds=2") < noise("rounds=3")
    away = "federation.participation.sampler={name: trace, there: {0: '1', 1: '1-2', 2: '3'}}"
    assert noise("rounds=3", away) == noise("rounds=2")


def test_sizes_that_clients_keep_are_not_drawn_by(tiny: Tiny) -> None:
    by_size = "federation.participation.sampler=size"
    with pytest.raises(ConfigError, match="which they keep to themselves here"):
        ExperimentContext(tiny(DP, *QUIET, by_size))
    given = "federation.participation={ask: 2, sampler: {name: size, sizes: [9, 5, 0]}}"
    assert set(ExperimentContext(tiny(DP, *QUIET, given)).cohort(1).asked) == {0, 1}
