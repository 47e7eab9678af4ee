"""Teachers on noisy labels in a federated run: what answers, what is kept, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedkd.config import ConfigError, make_config, make_experiment
from fedkd.privacy.label_dp import keep_probability
from fedkd.reporting.page import render
from fedkd.reporting.run_page import make_page
from fedkd.reporting.run_record import Found
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory, load_state
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.compare.config import Comparison
from fedkd.simulations.compare.study import CompareStudy
from fedkd.simulations.local import run_local
from fedkd.studies.audit.study import Options, audit_run
from fedkd.training.noisy.pair import Both
from tests.conftest import TINY, Shared, Tiny

pytestmark = pytest.mark.usefixtures("lean")

# Ten epochs over five rounds: the first selection is in the seventh, the first of round 4, and
# what is selected is still being unlearnt in round 5.
NOISY = "{partner: mlp, warmup: 2, trust: 1, unlearn: {start: 3, period: 3, length: 3}}"
PAIR = (
    "teachers.models=[{name: cnn_tiny, norm: batch}]",
    f"teachers.noisy={NOISY}",
    "rounds=5",
    "clients=2",
    "data.private=80",
    "distillation.losses=[ce]",
    "distillation.epochs=1",
    "fusion=[uniform]",
)


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


def curves(run: Path, client: int = 0) -> list[dict[str, Any]]:
    text = (run / "clients" / f"client-{client:04d}" / "noisy.json").read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = json.loads(text)
    return lines


def test_a_pair_answers_and_its_phases_go_on_from_round_to_round(shared: Shared) -> None:
    run = shared(*PAIR)
    lines = curves(run.path)
    assert [line["epoch"] for line in lines] == list(range(1, 11))
    phases = ["warm-up"] * 2 + ["learning"] * 4 + ["unlearning"] * 3 + ["learning"]
    assert [line["phase"] for line in lines] == phases
    tested = [line["epoch"] for line in lines if "accuracy_both" in line]
    assert tested == [2, 4, 6, 8, 10]  # at the end of each round
    folder = run.clients / "client-0000"
    saved = load_state(folder / "teacher-0005.pt")
    assert saved["followed"]["epoch"] == 10
    assert len(saved["followed"]["history"]["a"]) == 4  # what the next selection compares
    assert set(load_state(folder / "teacher-0004.pt")["followed"]["copies"]) == {"a", "v"}
    page = render(make_page(Found(run)))
    for text in ("Labels that may be wrong", "is from scratch", "up to 15 neighbours by pixels"):
        assert text in page
    context = ExperimentContext(run.experiment)
    model = run.experiment.teachers.model_of(0)
    pair = context.network_with(model, saved["weights"], 0).eval()
    assert isinstance(pair.body, Both)
    images = pair.normalise(context.data.test.images[:4])
    with torch.no_grad():
        both = pair.body.first(images) + pair.body.second(images)
        torch.testing.assert_close(pair.body(images), both)


def test_a_run_that_stops_while_it_unlearns_goes_on_to_the_same_student(
    tiny: Tiny, shared: Shared
) -> None:
    class Stop(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "phase" and facts["round"] == 5:
            raise Stop

    run = RunDirectory.new(tiny(*PAIR))
    with pytest.raises(Stop):
        run_local(run.experiment, run=run, notify=stop)
    assert curves(run.path, 1)[-1]["phase"] == "unlearning"
    resumed = run_local(run.experiment, run=RunDirectory.open(run.path))
    assert student(resumed) == student(shared(*PAIR))
    assert curves(run.path, 1) == curves(shared(*PAIR).path, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_in_an_unlearning_round_changes_nothing(tmp_path: Path) -> None:
    """The process is killed while the clients of round 5 train."""
    config = tmp_path / "noisy.yaml"
    experiment = make_experiment(TINY, [f"output={tmp_path / 'runs'}", *PAIR])
    config.write_text(yaml.safe_dump(experiment.model_dump(mode="json")), encoding="utf-8")
    code = "from fedkd.simulations.cli.main import main; main()"
    words = [sys.executable, "-c", code, "run"]
    assert subprocess.run([*words, str(config), "--runner", "local"], check=False).returncode == 0
    [reference] = (tmp_path / "runs").iterdir()
    process = subprocess.Popen([*words, str(config), "--runner", "local"])
    kept: list[Path] = []
    while not kept and process.poll() is None:
        places = [place for place in (tmp_path / "runs").iterdir() if place != reference]
        kept = [p for place in places for p in place.glob("clients/*/teacher-0004.pt")]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = kept[0].parents[2]
    done = subprocess.run([*words, "--resume", str(run), "--runner", "local"], check=False)
    assert done.returncode == 0
    assert student(RunDirectory.open(run)) == student(RunDirectory.open(reference))
    assert curves(run, 1) == curves(reference, 1)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        (["teachers.noisy={method: divide, warmup: 1, answer: weighted}"], Both),
        (["teachers.noisy={method: coteach, warmup: 1, answer: a}"], torch.nn.Module),
        (["teachers.noisy={method: gmm, warmup: 1}"], torch.nn.Module),
    ],
)
def test_what_answers_is_what_was_chosen(
    tiny: Tiny, changes: list[str], answer: type[torch.nn.Module]
) -> None:
    run = run_local(tiny(*PAIR, *changes, "rounds=1"))
    context = ExperimentContext(run.experiment)
    model = run.experiment.teachers.model_of(0)
    saved = load_state(run.clients / "client-0000" / "teacher-0001.pt")
    teacher = context.network_with(model, saved["weights"], 0)
    assert isinstance(teacher.body, answer)
    assert isinstance(teacher.body, Both) == (answer is Both)
    assert bool(context.kinds)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["rounds=3"], r"unlearn.start: nothing is ever .* epoch 6 .* 3 rounds x 2 epochs = 6"),
        (["rounds=1"], r"warmup: labels are judged after 2 epochs, .* 1 rounds x 2 epochs = 2"),
        (["teachers.noisy.warmup=4"], r"unlearn.start: the first selection, in epoch 6, compares"),
        (["teachers.noisy.unlearn.length=4"], r"unlearn.length: 4 epochs do not fit"),
        (["teachers.models=[cnn_tiny]"], "'cnn_tiny' has neither batch norm nor dropout"),
        (["teachers.noisy.partner={name: cnn_tiny, norm: batch}"], "is no pair of different"),
        (["teachers.noisy={warmup: 2}"], "partner.model: 'acdu' pairs two different networks"),
        (["teachers.noisy.method=gmm"], "partner: 'gmm' trains one network"),
        (["teachers.noisy.partner=mpl"], "teachers.noisy.partner.model: unknown model 'mpl'"),
        (
            ["teachers.noisy={method: divide, partner: {pretraining: own}}"],
            "partner.pretraining: 'divide' begins from scratch",
        ),
        (
            ["teachers.feedback.use=align"],
            "teachers.feedback.use: must be none with teachers.noisy",
        ),
        (["teachers.warm_start=false"], "teachers.warm_start: must be true with teachers.noisy"),
        (["teachers.label_smoothing=0.1"], "teachers.label_smoothing: must be 0 with"),
        (
            ["teachers.privacy={epsilon: 8, nominal_size: 40}"],
            "teachers.privacy.mechanism: must be label_dp with teachers.noisy",
        ),
        (["distillation.losses=[fitnet]"], "cannot be read from this network"),
    ],
)
def test_what_cannot_work_is_refused_before_a_client_is_asked(
    tiny: Tiny, changes: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ExperimentContext(tiny(*PAIR, *changes))


def test_of_labels_drawn_anew_for_privacy_the_share_of_right_ones_is_known(tiny: Tiny) -> None:
    words = (
        *PAIR,
        "teachers.noisy={method: gmm, warmup: 1}",
        "rounds=1",
        "evaluation.clients=false",
    )
    run = run_local(tiny(*words, "teachers.privacy={mechanism: label_dp, epsilon: 2.0}"))
    keep = keep_probability(2.0, 4)
    assert curves(run.path)[-1]["mixture"][4:] == pytest.approx([keep, 1 - keep])
    assert run.read_json("privacy.json")["worst"] == 2.0
    page = render(make_page(Found(run)))
    assert "Not shown: what a promise of privacy is about stays with the client." in page


def test_an_audit_refuses_teachers_that_its_shadows_would_not_be_like(shared: Shared) -> None:
    run = shared(*PAIR)
    with pytest.raises(ConfigError, match=r"teachers.noisy: shadow models are trained plainly"):
        audit_run(run, ExperimentContext(run.experiment), Options(shadows=2, canaries=50))


def test_baselines_are_given_no_noisy_teachers() -> None:
    words = {
        "teachers": {**TINY["teachers"], "models": ["mlp"], "noisy": {"method": "gmm", "warmup": 1}}
    }
    given = {"experiment": {**TINY, **words}, "methods": ["fedkd", "fedavg"]}
    with pytest.raises(ConfigError, match=r"fedavg: teachers.noisy: a baseline's clients train"):
        CompareStudy(make_config(Comparison, given)).check()
    context = ExperimentContext(make_experiment(given["experiment"]))
    with pytest.raises(ConfigError, match=r"teachers.noisy: a baseline's clients train plainly"):
        BASELINES.create("local_only").run(context, lambda _: None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_reaches_the_student_of_the_local_runner(tiny: Tiny, shared: Shared) -> None:
    from fedkd.simulations.ray import run_ray

    run = run_ray(tiny(*PAIR))
    assert student(run) == student(shared(*PAIR))
    assert [curves(run.path, client) for client in (0, 1)] == [
        curves(shared(*PAIR).path, client) for client in (0, 1)
    ]
