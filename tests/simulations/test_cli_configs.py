"""Each command takes its kind of config and of folder, and names the command of another kind."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from fedkd.config import ConfigError, Experiment, make_experiment
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.cli import run as run_command
from fedkd.simulations.cli.configs import load
from fedkd.training.evaluation import Scores
from tests.conftest import TINY
from tests.simulations.conftest import Fedkd


@pytest.mark.parametrize(
    ("command", "file", "other"),
    [
        ("run", "distill/digits", "distill"),
        ("run", "compare/quickstart", "compare"),
        ("run", "attack/quickstart", "attack"),
        ("partition", "ablate/fusion", "ablate"),
        ("config show", "privacy/digits", "privacy sweep"),
        ("privacy plan", "compare/quickstart", "compare"),
        ("privacy sweep", "quickstart", "run"),
        ("distill", "quickstart", "run"),
        ("compare", "quickstart", "run"),
        ("compare", "distill/digits", "distill"),
        ("ablate", "compare/quickstart", "compare"),
        ("attack", "ablate/fusion", "ablate"),
    ],
)
def test_a_config_of_another_command_is_said_to_be_its(
    command: str, file: str, other: str, fedkd: Fedkd
) -> None:
    path = f"configs/{file}.yaml"
    code, _, stderr = fedkd(*command.split(), path)
    assert code == 2
    assert stderr == (
        f"fedkd: {path}: is a config of fedkd {other}, not of fedkd {command}; "
        f"try: fedkd {other} {path}\n"
    )


def test_a_mistake_in_a_config_of_the_right_kind_is_that_mistake() -> None:
    with pytest.raises(ConfigError, match=r"^rouns: unknown key"):
        load(Experiment, "configs/quickstart.yaml", ["rouns=3"], "run")
    with pytest.raises(ConfigError, match=r"^rounds is given twice: rounds=3 and rounds=4$"):
        load(Experiment, "configs/quickstart.yaml", ["rounds=3", "rounds=4"], "run")
    with pytest.raises(ConfigError, match="before the first override: fedkd run CONFIG rounds=3"):
        load(Experiment, "rounds=3", [], "run")


@pytest.mark.parametrize("command", ["run --resume", "audit", "contribution", "status"])
def test_a_folder_of_another_command_is_no_run(command: str, tmp_path: Path, fedkd: Fedkd) -> None:
    (tmp_path / "config.yaml").write_text("study: distill\nmethods: {kd: [kd]}\n")
    code, _, stderr = fedkd(*command.split(), tmp_path)
    assert code == 2
    assert "is a folder of fedkd distill; expected a run directory" in stderr
    for missing in (tmp_path / "missing", tmp_path / "config.yaml", "/dev/null"):
        code, _, stderr = fedkd(*command.split(), missing)
        assert code == 2
        assert f"{missing} is not a run directory" in stderr


def test_a_finished_run_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedkd: Fedkd
) -> None:
    run = RunDirectory.new(make_experiment(TINY, [f"output={tmp_path}", "rounds=1"]))
    assert not run_command._is_finished(run)
    run.record(RoundFinished(round=1, student=Scores(accuracy=0.5)))
    assert not run_command._is_finished(run)
    monkeypatch.setattr(RunDirectory, "read_json", lambda *_: {})
    assert run_command._is_finished(run)
    monkeypatch.setattr(run_command, "_run", lambda *_: pytest.fail("it was run"))
    monkeypatch.setattr("fedkd.simulations.cli.tables.run_tables", lambda _: "the table")
    code, out, err = fedkd("run", "--resume", run.path)
    assert (code, err) == (0, "")
    assert "nothing is left\nthe table\n" in out


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.xyz", "ends with .png"), ("", "ends with .png"), ("missing/x.png", "there is no folder")],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    name: str, expected: str, tmp_path: Path, fedkd: Fedkd
) -> None:
    code, _, stderr = fedkd("partition", "configs/none.yaml", "--picture", tmp_path / name)
    assert (code, expected in stderr) == (2, True)


@pytest.mark.parametrize(
    ("command", "file", "word"),
    [
        ("run", "quickstart", "resources.client_gpus=99"),
        ("run", "quickstart", "resources.device=cuda:99"),
        ("compare", "compare/quickstart", "experiment.resources.client_gpus=99"),
        ("compare", "compare/quickstart", "experiment.resources.device=cuda:99"),
        ("ablate", "ablate/fusion", "experiment.resources.client_gpus=99"),
        ("privacy sweep", "privacy/digits", "experiment.resources.device=cuda:99"),
        ("attack", "attack/quickstart", "experiment.resources.client_gpus=99"),
        ("attack", "attack/quickstart", "experiment.resources.device=cuda:99"),
        ("distill", "distill/digits", "experiment.resources.device=cuda:99"),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_a_folder_exists(
    command: str, file: str, word: str, tmp_path: Path, fedkd: Fedkd
) -> None:
    code, _, stderr = fedkd(
        *command.split(), f"configs/{file}.yaml", word, f"output={tmp_path}/runs"
    )
    assert code == 2
    assert word.partition("=")[0].removeprefix("experiment.") in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.smoke
@pytest.mark.skipif(
    tuple(map(int, metadata.version("click").split(".")[:2])) >= (8, 5),
    reason="this click is out of the bounds in pyproject.toml: pip install 'click<8.5'",
)
@pytest.mark.parametrize(
    ("command", "text"),
    [("run", "a YAML file"), ("run", "key=value, e.g. rounds=5"), ("predict", "a run directory")],
)
def test_the_help_of_a_command_shows_what_its_arguments_are(
    command: str, text: str, fedkd: Fedkd
) -> None:
    """Lost by typer below 0.21 beside click from 8.5 on: see the bounds in pyproject.toml."""
    assert text in fedkd(command, "--help")[1]


def test_a_sweep_is_planned_row_by_row(fedkd: Fedkd, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        """
study: privacy sweep
epsilons: [inf, 10]
experiment:
  rounds: 1
  clients: 2
  data: {dataset: synthetic, transfer: {size: 40}, partition: iid}
  teachers: {models: [mlp], epochs: 1}
mechanisms:
  dp: {fusion: [uniform], teachers.privacy: {nominal_size: 100, delta: 1.0e-3}}
"""
    )
    code, out, err = fedkd("privacy", "plan", sweep)
    assert (code, err) == (0, "")
    assert re.search(r"dp-10 .*7 steps at .*1e-03 .*\d\.\d+ .*%", out)
    assert "dp-inf" not in out
