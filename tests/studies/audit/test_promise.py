"""A run's own promise is what is audited, and what the audit cannot test it does not claim to."""

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from fedkd.config import ConfigError, make_experiment
from fedkd.rounds import experiment_context
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.cli.main import app
from fedkd.simulations.local import run_local
from fedkd.studies.audit.promise import Claim, Training, promised
from fedkd.studies.audit.report import sentence
from fedkd.studies.audit.study import Options, audit_run
from fedkd.studies.audit.training import train_again
from fedkd.training.evaluation import Scores
from tests.conftest import TINY, Tiny
from tests.studies.audit.breaks import broken

QUICK = Options(shadows=2, canaries=50)
BASE = (
    "teachers.models=[mlp]", "student.model=mlp", "fusion=[uniform]",
    "distillation.losses=[kd]", "distillation.epochs=1", "teachers.epochs=1", "data.private=60",
    "evaluation.baselines=[]", "evaluation.clients=false", "data.partition=iid",
)  # fmt: skip
DP_SGD = (
    "teachers.privacy.nominal_size=20",
    "teachers.privacy.epsilon=3",
    "teachers.privacy.delta=1e-3",
)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    output = tmp_path_factory.mktemp("private")
    return run_local(make_experiment(TINY, [f"output={output}", *BASE, *DP_SGD]))


def test_mechanism_and_claim_come_from_the_plan_and_the_ledger(private: RunDirectory) -> None:
    run = private
    space = experiment_context(run.experiment)
    own = promised(run, space, 1)
    assert own.training == Training(2, space.plan.mechanism)
    assert 2.9 < own.claim.epsilon <= 3 * (1 + 1e-9)
    assert own.claim.delta == 1e-3
    facts = audit_run(run, space, QUICK)
    assert facts["claim"]["epsilon"] == pytest.approx(own.claim.epsilon)
    assert facts["bound"]["delta"] == 1e-3
    assert facts["training"]["rounds"] == 2
    assert facts["training"]["mechanism"]["noise_multiplier"] == (
        space.plan.mechanism.noise_multiplier
    )
    assert facts["verdict"] != "refuted"
    with pytest.raises(ConfigError, match="this run promises privacy itself"):
        audit_run(run, space, QUICK, claim=Claim(1.0, 1e-3))
    for option in ("--epsilon", "--delta", "--noise-multiplier", "--nominal-size"):
        refused = CliRunner().invoke(app, ["audit", str(run.path), option, "1"])
        assert str(refused.exception).startswith(f"{option}: this run promises privacy itself")


def test_a_private_run_is_audited_and_its_page_keeps_both_audits(
    private: RunDirectory, tmp_path: Path
) -> None:
    shutil.copytree(private.path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "audit.json").unlink(missing_ok=True)  # of the test before
    run = RunDirectory(tmp_path, private.experiment, private.identity)
    words = ["audit", str(run.path)]
    passed = CliRunner().invoke(app, [*words, "--mechanism", "--trainings", "50"])
    assert passed.exit_code == 0, passed.output
    assert "passes all 10 tests" in " ".join(passed.stdout.split())
    facts = run.read_json("audit.json")
    assert set(facts) == {"run", "mechanism"}  # of an audit that did not attack
    found = facts["mechanism"]
    assert found["training"]["rounds"] == 2
    assert found["claim"]["delta"] == 0.001
    # All four steps of the run are taken, so the claim is the run's.
    assert found["claim"]["epsilon"] == pytest.approx(3, rel=0.02)
    attacked = CliRunner().invoke(app, [*words, "--shadows", "0", "--canaries", "50"])
    assert attacked.exit_code == 0, attacked.output
    assert run.read_json("audit.json")["mechanism"] == found
    page = (run.path / "audit.html").read_text(encoding="utf-8")
    assert "Attacks on the run" in page
    assert "From every step: how strongly the canary" in page
    assert "Does the code do what the promise rests on?" in page
    with broken("noise / 4"), mock.patch("fedkd.rounds.context.check_noise"):
        refuted = CliRunner().invoke(app, [*words, "--mechanism", "--trainings", "50"])
    assert refuted.exit_code == 1
    assert "not the promised one" in " ".join(refuted.stdout.split())
    assert run.read_json("audit.json")["mechanism"]["verdict"] == "refuted"


def test_a_ledger_that_was_changed_or_is_missing_makes_no_claim(
    private: RunDirectory, tmp_path: Path
) -> None:
    shutil.copytree(private.path, tmp_path, dirs_exist_ok=True)
    run = RunDirectory(tmp_path, private.experiment, private.identity)
    space = experiment_context(run.experiment)
    ledger = run.clients / "client-0000" / "privacy.jsonl"
    ledger.write_text(ledger.read_text().replace("settled", "setlted"))
    with pytest.raises(ConfigError, match="was changed"):
        promised(run, space, 0)
    ledger.unlink()
    with pytest.raises(ConfigError, match="client 0 keeps no ledger"):
        promised(run, space, 0)


def test_a_teacher_that_begins_anew_saw_private_images_in_one_round(tiny: Tiny) -> None:
    kept, anew = tiny(*BASE), tiny(*BASE, "teachers.warm_start=false")
    for experiment, rounds in ((kept, 2), (anew, 1)):
        run = RunDirectory.new(experiment)
        for number in (1, 2):
            run.record(RoundFinished(round=number, student=Scores(accuracy=0.5)))
        own = promised(run, experiment_context(experiment), 0)
        assert own.training == Training(rounds)
        assert (own.claim, own.text) == (None, "")


def test_label_privacy_is_said_to_be_untested(tiny: Tiny) -> None:
    run = run_local(
        tiny(*BASE, "teachers.privacy.mechanism=label_dp", "teachers.privacy.epsilon=1")
    )
    space = experiment_context(run.experiment)
    facts = audit_run(run, space, QUICK)
    assert facts["training"]["label_epsilon"] == 1
    assert facts["training"]["mechanism"] is None
    assert (facts["claim"], facts["verdict"]) == (None, "no claim")
    text = sentence(facts)
    assert "The run promises label privacy, epsilon 1" in text
    assert "The audit does not test that" in text


def test_shadows_learn_from_lies_where_labels_are_randomised(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = experiment_context(tiny(*BASE))
    images = space.data.shard(0)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "fedkd.studies.audit.training.fit",
        lambda teacher, shard, **_options: seen.append(shard.labels),
    )
    train_again(space, 0, images, Training(2, label_epsilon=0.01), "lies")
    train_again(space, 0, images, Training(1), "truth")
    assert torch.equal(seen[0], seen[1])  # drawn once for all rounds
    assert not torch.equal(seen[0], images.labels)
    assert torch.equal(seen[2], images.labels)


def test_what_is_promised_behind_the_server_is_said_to_be_untested(tiny: Tiny) -> None:
    experiment = tiny(
        *BASE,
        "release={name: prob_sum, epsilon: 2, min_clients: 3}",
        "evaluation.teachers=false",
        "distillation.losses=[{name: kd, temperature: 1.0}]",
    )
    own = promised(RunDirectory.new(experiment), experiment_context(experiment), 0)
    assert own.claim is None
    assert "what leaves the server is private (release 'prob_sum')" in own.text
