"""Trackers hear what metrics.jsonl holds; one that fails costs nothing but itself."""

import builtins
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedkd.config import ConfigError, make_config
from fedkd.io.extras import MissingExtra
from fedkd.rounds import Interrupted
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientTrained, EpochFinished, RoundFinished, Warned
from fedkd.runs.trackers import TRACKERS
from fedkd.runs.trackers.base import Axis, Tracked, Tracker
from fedkd.runs.tracking import HANDLES, check_trackers, flat
from fedkd.simulations.local import run_local
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.folder import Place
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.engine import StudyFolder, run_study
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")

CENTRAL = {
    "experiment": {
        "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 20}},
        "teachers": {"models": ["cnn_tiny"], "epochs": 2},
        "student": {"model": {"name": "cnn_tiny", "width": 4}},
        "distillation": {"epochs": 2},
        "resources": {"device": "cpu"},
        "track": ["memory"],
    },
    "methods": {"kd": ["ce", "kd"]},
}
SMALL = ("teachers.epochs=1", "teachers.models=[mlp]", "distillation.losses=[kd]")


class Memory(Tracker):
    """Keeps what it hears."""

    made: ClassVar[list["Memory"]] = []

    def __init__(self, run: Tracked, *, broken: str = "") -> None:
        self.run, self.broken = run, broken
        self.rows: list[tuple[Axis, int, Mapping[str, float]]] = []
        self.final: Mapping[str, float] = {}
        self.files: list[str] = []
        self.closed: bool | None = None
        self.handle = run.handle or f"number {len(self.made)}"
        self.made.append(self)

    @classmethod
    def check(cls) -> None:
        pass

    def log(self, axis: Axis, step: int, scalars: Mapping[str, float]) -> None:
        if self.broken == "log":
            raise OSError("no route to host\nfor hours")
        self.rows.append((axis, step, dict(scalars)))

    def finish(self, final: Mapping[str, float], files: Sequence[Path]) -> None:
        self.final, self.files = final, [path.name for path in files]

    def close(self, *, complete: bool) -> None:
        self.closed = complete


@pytest.fixture(autouse=True)
def memory() -> Iterator[list[Memory]]:
    TRACKERS.register("memory")(Memory)
    Memory.made = []
    yield Memory.made
    del TRACKERS._members["memory"]


def stopping(number: int) -> Any:
    def notify(event: str, **facts: Any) -> None:
        if event == "round" and facts["round"] == number:
            raise Interrupted

    return notify


def test_a_tracker_hears_what_the_files_hold(tiny: Tiny, memory: list[Memory]) -> None:
    run = run_local(tiny(*SMALL, "track=memory"))
    (heard,) = memory
    rounds = {step: row for axis, step, row in heard.rows if axis == "round"}
    written = run.events(RoundFinished)
    assert list(rounds) == [event.round for event in written] == [1, 2]
    assert rounds[2]["student/accuracy"] == written[1].student.accuracy
    assert rounds[2]["seconds/train"] == written[1].seconds["train"]
    for event in run.events(ClientTrained):
        assert rounds[event.round][f"client/{event.client}/loss"] == event.loss
        assert rounds[event.round][f"client/{event.client}/bytes"] == sum(
            m.up + m.down
            for m in run.messages()
            if m.client == event.client and m.round == event.round and m.phase != "describe"
        )
    assert rounds[2]["bytes/total"] == sum(m.up + m.down for m in run.messages())
    epochs = [step for axis, step, _ in heard.rows if axis == "epoch"]
    assert epochs == [1, 2, 3, 4]
    assert [row["epoch/loss"] for axis, _, row in heard.rows if axis == "epoch"] == [
        event.loss for event in run.events(EpochFinished)
    ]
    assert heard.run.parameters["distillation.losses.0.name"] == "kd"
    assert heard.final["final/student"] == run.read_json("summary.json")["student"]["accuracy"]
    assert heard.files == ["summary.json", "config.yaml"]  # lean: no page
    assert heard.closed is True
    alone = run_local(tiny(*SMALL))
    hashes = {each.read_json("summary.json")["hash"] for each in (run, alone)}
    assert len(hashes) == 1


def test_a_resumed_run_goes_on_under_its_name(tiny: Tiny, memory: list[Memory]) -> None:
    with pytest.raises(Interrupted):
        run_local(tiny(*SMALL, "track=memory", "rounds=2"), notify=stopping(1))
    (folder,) = (Path(memory[0].run.folder).parent).iterdir()
    run = RunDirectory.open(folder)
    run_local(run.experiment, run=run)
    first, second = memory
    assert first.closed is False
    assert second.closed is True
    assert second.handle == first.handle == run.read_json(HANDLES)["memory"]
    assert second.run.identity == first.run.identity == folder.name
    assert second.run.steps == {"round": 1, "epoch": 2}
    assert [step for axis, step, _ in second.rows if axis == "round"] == [2]


def test_a_tracker_that_fails_costs_one_warning(tiny: Tiny, memory: list[Memory]) -> None:
    run = run_local(tiny(*SMALL, "rounds=1", "track={name: memory, broken: log}"))
    text = "tracker 'memory' failed, so the run goes on without it: no route to host"
    assert trackers_warnings(run) == [text]
    assert run.read_json("summary.json") is not None
    assert memory[0].closed is False


def trackers_warnings(run: RunDirectory) -> list[str]:
    return [event.text for event in run.events(Warned) if event.text.startswith("tracker")]


def test_every_training_of_a_central_study_is_tracked(tmp_path: Path, memory: list[Memory]) -> None:
    study = DistillStudy(make_config(DistillConfig, CENTRAL))
    folder = StudyFolder.new(study.config, tmp_path)

    def stop(event: str, **facts: Any) -> None:
        if event == "epoch" and facts["label"] == "kd, seed 0" and facts["epoch"] == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_study(study, folder, stop)
    run_study(study, folder)
    assert [each.run.parameters["label"] for each in memory] == [
        "teacher",
        "student, seed 0",
        "kd, seed 0",
        "kd, seed 0",
    ]
    first, second = memory[2:]
    assert (first.closed, second.closed) == (False, True)
    assert first.handle == second.handle
    assert first.run.identity == second.run.identity == f"{folder.path.name}-methods-kd-seed0"
    assert second.run.steps["epoch"] == 1
    assert second.run.parameters["distillation.losses.1.name"] == "kd"
    place = Place.of_student(folder.path, "kd", 0)
    records, rows = place.epochs(), [*first.rows, *second.rows]
    assert [(axis, step) for axis, step, _ in rows] == [("epoch", 1), ("epoch", 2)]
    for (_, _, row), record in zip(rows, records, strict=True):
        assert row["epoch/loss"] == record["loss"]
        assert row["epoch/accuracy"] == record["accuracy"]
        assert row["epoch/kd"] == record["terms"]["kd"]
    result = place.result()
    assert result is not None
    assert second.final["final/last"] == result["last"]
    assert second.files == ["results.json", "settings.json"]
    cell = study.cells[0]
    assert "track" not in cell.settings()["experiment"]


def test_trackers_of_a_central_study_are_checked_before_there_is_a_folder() -> None:
    study = DistillStudy(make_config(DistillConfig, CENTRAL, ["experiment.track=wandbb"]))
    with pytest.raises(ConfigError, match=r"experiment\.track\.0: unknown tracker 'wandbb'"):
        study.check()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("tensorbord", "track.0: unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("[memory, memory]", "track.1: 'memory' is named twice"),
        ("{name: memory, brokn: x}", "track.0: tracker 'memory' has no option 'brokn'"),
        ("{name: wandb, mode: sometimes}", "track.0: tracker 'wandb': mode: "),
    ],
)
def test_what_cannot_be_tracked_is_refused_before_there_is_a_folder(
    tiny: Tiny, tmp_path: Path, chosen: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run_local(tiny(f"track={chosen}"))
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_named_with_its_command(
    tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def missing(wanted: str, *args: Any, **options: Any) -> Any:
        if wanted.startswith((name, "torch.utils.tensorboard")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(wanted, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    message = f"track.0: tracker '{name}' needs {name}: pip install 'fedkd[{name}]'"
    with pytest.raises(MissingExtra) as refused:
        check_trackers(tiny(f"track={name}").track)
    assert str(refused.value) == message


def test_parameters_are_dotted_and_plain() -> None:
    found = flat({"a": {"b": [{"c": 1}, 2.5], "d": None, "e": []}, "f": True})
    assert found == {"a.b.0.c": 1, "a.b.1": 2.5, "a.d": "null", "a.e": "[]", "f": True}


def interrupted_and_resumed(experiment: Any) -> RunDirectory:
    with pytest.raises(Interrupted):
        run_local(experiment, notify=stopping(1))
    (folder,) = Path(experiment.output).glob("tiny-*")
    run = RunDirectory.open(folder)
    run_local(run.experiment, run=run)
    run = RunDirectory.open(folder)  # nothing in it is a link
    assert trackers_warnings(run) == []
    return run


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_files_hold_the_curves(tiny: Tiny) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'fedkd[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted_and_resumed(tiny(*SMALL, "track=[tensorboard]"))
    rounds, epochs = (EventAccumulator(str(run.path / name)) for name in
                      ("tensorboard", "tensorboard/epochs"))  # fmt: skip
    rounds.Reload()
    epochs.Reload()
    points = rounds.Scalars("student/accuracy")
    written = run.events(RoundFinished)
    assert [point.step for point in points] == [event.round for event in written] == [1, 2]
    assert [point.value for point in points] == pytest.approx(
        [event.student.accuracy for event in written]
    )
    assert [point.step for point in epochs.Scalars("epoch/loss")] == [1, 2, 3, 4]
    assert "client/2/bytes" in rounds.Tags()["scalars"]
    assert "_hparams_/session_start_info" in rounds.PluginTagToContent("hparams")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_mlflow_keeps_one_run_in_its_local_store(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'fedkd[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    uri = store.format(tmp_path)
    run = interrupted_and_resumed(tiny(*SMALL, f"track={{name: mlflow, uri: '{uri}'}}"))
    client = mlflow.MlflowClient(tracking_uri=uri)
    number = client.get_experiment_by_name("tiny").experiment_id
    (kept,) = client.search_runs([number])
    assert kept.info.run_name == run.identity
    assert kept.info.status == "FINISHED"
    assert kept.data.params["rounds"] == "2"
    history = client.get_metric_history(kept.info.run_id, "student/accuracy")
    assert [(m.step, m.value) for m in history] == [
        (event.round, event.student.accuracy) for event in run.events(RoundFinished)
    ]
    assert kept.data.metrics["final/student"] == history[-1].value
    names = {file.path for file in client.list_artifacts(kept.info.run_id)}
    assert names == {"summary.json", "config.yaml"}


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_keeps_the_run_in_its_folder(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason="pip install 'fedkd[wandb]'")
    monkeypatch.chdir(tmp_path)
    run = interrupted_and_resumed(tiny(*SMALL, "track={name: wandb, mode: offline}"))
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert run.identity in first.name == second.name
    for number, file in enumerate((first, second)):  # records with names and JSON values in them
        kept = file.read_bytes()
        assert b"student/accuracy" in kept
        assert json.dumps(run.events(RoundFinished)[number].student.accuracy).encode() in kept
        assert (b"final/student" in kept) is (number == 1)
    assert not (run.path / "wandb").exists()
