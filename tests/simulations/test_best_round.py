"""The student of the best round by validation, and the end of a run that gets no better."""

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from fedkd.config import ConfigError, make_experiment
from fedkd.models.network import Network
from fedkd.reporting.run_record import Found
from fedkd.reporting.run_tables import results_table
from fedkd.runs.choice import is_over, kept_round
from fedkd.runs.directory import RunDirectory, network_hash
from fedkd.runs.events import ClientEvaluated, RoundFinished
from fedkd.runs.students import load_student
from fedkd.simulations.compare.study import read_run
from fedkd.simulations.local import run_local
from fedkd.training.evaluation import evaluate
from tests.conftest import TINY

SHORT = (
    "teachers.models=[mlp]",
    "fusion=[entropy]",
    "evaluation.baselines=[]",
    "evaluation.teachers=false",
    "teachers.epochs=1",
    "distillation.epochs=1",
)
CHOSEN = (*SHORT, "data.validation=24", "evaluation.best=true", "evaluation.patience=1", "rounds=5")
# What the validation images say of the rounds, whatever the students are.
SAID = (0.5, 0.7, 0.6, 0.9, 0.1)


class Killed(BaseException):
    """The process ends."""


@pytest.fixture
def told() -> Iterator[None]:
    """The best round is the second, and the third ends the run."""
    with mock.patch("fedkd.rounds.server.evaluate", side_effect=SAID):
        yield


def run(folder: Path, *overrides: str, notify: Callable[..., None] | None = None) -> RunDirectory:
    experiment = make_experiment(TINY, [f"output={folder}", *overrides])
    return run_local(experiment, **({} if notify is None else {"notify": notify}))


def test_the_first_of_the_best_rounds_counts_and_patience_runs_from_it() -> None:
    given = make_experiment(TINY, CHOSEN)
    assert kept_round(given, {}) is None
    assert kept_round(given, {1: 0.5, 2: 0.7, 3: 0.7}) == 2
    assert [is_over(given, dict(enumerate(SAID[:n], 1))) for n in (0, 1, 2, 3)] == [
        False,
        False,
        False,
        True,
    ]
    last = make_experiment(TINY)
    assert kept_round(last, {1: None, 2: None}) == 2
    assert is_over(last, {1: None, 2: None})


@pytest.mark.usefixtures("told")
def test_the_student_of_the_best_round_leaves_the_run(tmp_path: Path) -> None:
    found = run(tmp_path, *CHOSEN)
    rounds = found.events(RoundFinished)
    assert [event.validation for event in rounds] == list(SAID[:3])
    summary = found.read_json("summary.json")
    assert summary["kept"] == {"round": 2, "validation": 0.7, "images": 24}
    assert summary["student"]["accuracy"] == rounds[1].student.accuracy
    student = load_student(found)
    assert network_hash(student.network) == summary["hash"] == rounds[1].hash != rounds[2].hash
    assert evaluate(student.network, student.test()) == rounds[1].student.accuracy
    judged = found.events(ClientEvaluated)
    assert {event.round for event in judged} == {3}
    assert _right(student.network, found) == [event.holdout_right for event in judged]
    assert found.is_over
    own = results_table(Found(found)).rows[0]
    assert "after round 2, the best on 24 validation images" in str(own.cells)
    assert read_run(found).kept == 2


def _right(student: Network, found: RunDirectory) -> list[float]:
    from fedkd.rounds.context import context_of_run

    data = context_of_run(found, found.experiment).data
    shares = [(evaluate(student, data.holdout(n)), len(data.holdout(n))) for n in range(3)]
    return [round(share * size) for share, size in shares]


def test_a_run_that_was_killed_keeps_the_same_student(tmp_path: Path) -> None:
    def kill(event: str, **_facts: object) -> None:
        if event == "round":
            raise Killed

    with mock.patch("fedkd.rounds.server.evaluate", side_effect=SAID):
        whole = run(tmp_path / "whole", *CHOSEN)
    with mock.patch("fedkd.rounds.server.evaluate", side_effect=SAID):
        for _ in range(3):  # also between the last round and the summary
            with pytest.raises(Killed):
                _again(tmp_path / "killed", kill)
        killed = _again(tmp_path / "killed", lambda *_, **__: None)
    for key in ("hash", "kept"):
        assert killed.read_json("summary.json")[key] == whole.read_json("summary.json")[key]
    assert len(killed.events(RoundFinished)) == 3
    (killed.path / "checkpoints" / "round-0002.pt").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"round-0002\.pt: the student of the round that is best"):
        load_student(killed)


def _again(folder: Path, notify: Callable[..., None]) -> RunDirectory:
    begun = list(folder.glob("*/config.yaml"))
    if not begun:
        return run(folder, *CHOSEN, notify=notify)
    found = RunDirectory.open(begun[0].parent)
    return run_local(found.experiment, run=found, notify=notify)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("evaluation.best=true",), r"evaluation\.best: .* set data\.validation to their number"),
        (("evaluation.patience=2",), r"evaluation\.patience: .* set evaluation\.best=true"),
    ],
)
def test_what_cannot_be_chosen_is_refused(overrides: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_experiment(TINY, overrides)
