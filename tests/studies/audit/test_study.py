"""An overfitted run is caught; noise and untrained teachers are not accused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import create_accountant
from typer.testing import CliRunner

from fedkd.build import build_network
from fedkd.config import ConfigError, make_experiment
from fedkd.data.images import ImageSet
from fedkd.privacy.dp_sgd import Mechanism
from fedkd.rounds import ExperimentContext, experiment_context
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.cli.main import app
from fedkd.simulations.local import run_local
from fedkd.studies.audit.membership import confidence, membership
from fedkd.studies.audit.one_run import Bound
from fedkd.studies.audit.promise import Claim, Training, stronger, verdict
from fedkd.studies.audit.report import write
from fedkd.studies.audit.study import Options, audit_run, epsilon_of_training, unseen
from fedkd.studies.audit.training import matched, mislabelled, tossed
from fedkd.training.evaluation import predict

OVERFITTED: dict[str, Any] = {
    "name": "overfitted",
    "rounds": 1,
    "clients": 2,
    "data": {"dataset": "digits", "partition": "iid", "transfer": {"size": 100}, "private": 160},
    "teachers": {
        "models": [{"name": "mlp", "hidden": 128}],
        "epochs": 60,
        "optimizer": {"name": "adamw", "lr": 0.005, "weight_decay": 0.0},
    },
    "student": {"model": {"name": "mlp"}},
    "distillation": {"losses": ["kd"], "epochs": 5},
    "evaluation": {"baselines": [], "clients": False, "teachers": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs")
    return run_local(make_experiment({**OVERFITTED, "output": str(output)}))


@pytest.fixture(scope="module")
def space(run: RunDirectory) -> ExperimentContext:
    return experiment_context(run.experiment)


def test_an_overfitted_run_is_caught_and_the_page_says_so(
    run: RunDirectory, space: ExperimentContext, tmp_path: Path
) -> None:
    seen: list[str] = []
    facts = audit_run(
        run,
        space,
        Options(shadows=4, canaries=150),
        claim=Claim(0.5, 1e-5),
        notify=lambda event, **facts: seen.append(facts["note"]),
    )
    found = {(a["target"], a["attack"], a["client"]): a for a in facts["attacks"]}
    assert found["teacher", "lira", facts["client"]]["auc_interval"][0] > 0.5
    assert found["teacher", "loss", facts["client"]]["leaks"]
    assert ("knowledge", "calibrated", facts["client"]) in found
    assert ("student", "loss", None) in found
    assert facts["bound"]["epsilon"] > 1
    assert facts["verdict"] == "refuted"
    assert len(seen) == 6
    assert run.read_json("audit.json")["bound"] == facts["bound"]
    page = write(facts, tmp_path).read_text(encoding="utf-8")
    assert "refuted" in page
    assert "claimed: at most 0.5" in page


def test_large_noise_shows_nothing_and_its_claim_stands(space: ExperimentContext) -> None:
    mechanism = Mechanism.of(80, 32, 2, 20.0)
    bounds = epsilon_of_training(space, 0, unseen(space), 150, 1e-5, Training(1, mechanism))
    assert stronger(*bounds).epsilon < 0.5
    assert verdict(Claim(0.5, 1e-5), stronger(*bounds)) == "consistent"


def test_a_private_training_does_not_contradict_its_accountant(space: ExperimentContext) -> None:
    mechanism = Mechanism.of(80, 32, 10, 1.0)
    accountant = create_accountant("rdp")
    accountant.history = [(1.0, mechanism.sample_rate, mechanism.steps)]
    claim = Claim(accountant.get_epsilon(1e-5), 1e-5)
    bounds = epsilon_of_training(space, 0, unseen(space), 150, claim.delta, Training(1, mechanism))
    assert [bound.confidence for bound in bounds] == [0.975, 0.975]
    assert stronger(*bounds).epsilon <= claim.epsilon
    assert verdict(claim, stronger(*bounds)) != "refuted"


def test_the_command_fails_on_a_refuted_claim_alone(run: RunDirectory) -> None:
    words = ["audit", str(run.path), "--shadows", "0", "--canaries", "150"]
    kept = CliRunner().invoke(app, words)
    assert kept.exit_code == 0
    assert "Canaries show that epsilon is at least" in " ".join(kept.stdout.split())
    assert (run.path / "audit.html").is_file()
    refuted = CliRunner().invoke(app, [*words, "--epsilon", "0.5"])
    assert refuted.exit_code == 1
    wrong = CliRunner().invoke(app, [*words, "--noise-multiplier", "-1"])
    assert isinstance(wrong.exception, ConfigError)
    assert str(wrong.exception).startswith("--noise-multiplier: expected at least 0, got -1")


def test_a_teacher_trained_on_nothing_is_not_accused(space: ExperimentContext) -> None:
    model = space.experiment.teachers.model_of(0)
    teacher = build_network(space.experiment, model, space.data, "nothing")
    members, others = matched(space.data.shard(0), unseen(space), 1000, 0)
    scores = [confidence(predict(teacher, s.images), s.labels) for s in (members, others)]
    low, high = membership(*scores, np.random.default_rng(0)).auc_interval
    assert low < 0.5 < high


def test_verdicts() -> None:
    bound = Bound(1.5, 3.0, 1e-5, 0.95, 100, 100, 90)
    assert verdict(Claim(1.4, 1e-5), bound) == "refuted"
    assert verdict(Claim(2.0, 1e-5), bound) == "consistent"
    assert verdict(Claim(8.0, 1e-5), bound) == "no power"
    assert verdict(None, bound) == "no claim"


def test_both_sides_of_an_attack_have_the_same_labels() -> None:
    pixels = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    members = ImageSet(pixels, labels, ("a", "b", "c"))
    others = replace(members, labels=torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1]))
    first, second = matched(members, others, 100, 0)
    assert first.class_counts().tolist() == second.class_counts().tolist() == [2, 2, 0]
    assert len(matched(members, others, 3, 0)[0]) == 3


def test_canaries_have_wrong_labels_and_even_coins(space: ExperimentContext) -> None:
    pool = unseen(space)
    right = {image.numpy().tobytes(): int(label) for image, label in zip(pool.images, pool.labels)}
    canaries = mislabelled(pool, 100, 0)
    for image, label in zip(canaries.images, canaries.labels):
        assert right[image.numpy().tobytes()] != int(label)
    assert 440 < tossed(1000, 0).sum() < 560
    with pytest.raises(ValueError, match="100000 are asked for"):
        mislabelled(pool, 100_000, 0)


def test_another_draw_has_other_canaries_and_coins(
    space: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def toss(count: int, seed: int) -> np.ndarray:
        seeds.append(seed)
        raise LookupError

    monkeypatch.setattr("fedkd.studies.audit.study.tossed", toss)
    for draw in (0, 1, 1, 2):
        with pytest.raises(LookupError):
            epsilon_of_training(space, 0, unseen(space), 50, 1e-5, Training(1, None), draw)
    assert seeds[0] == space.experiment.seed
    assert seeds[1] == seeds[2]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Options(shadows=3), "--shadows: expected 0 or an even number, got 3"),
        (lambda: Options(canaries=10), "--canaries: expected 0 or at least 50, got 10"),
    ],
)
def test_impossible_options_are_refused(make: Callable[[], Options], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_run_without_its_teachers_is_refused(
    run: RunDirectory, space: ExperimentContext, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(run.experiment.to_yaml())
    with pytest.raises(ConfigError, match="client 0 keeps no teacher"):
        audit_run(RunDirectory.open(tmp_path), space, Options(shadows=0, canaries=0))
    with pytest.raises(ConfigError, match="this run's clients are 0 to 1"):
        audit_run(run, space, Options(client=2))
