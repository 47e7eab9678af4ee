"""Cells of a study beside each other: the table of cells run one after the other."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedkd.config import ConfigError, make_config
from fedkd.rounds import Interrupted, Notify, silent
from fedkd.simulations import jobs
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.engine import Cell, Record, StudyFolder, run_study
from tests.studies.test_central import TINY

SHORT = (
    "seeds=[0,1]", "only=kd",
    "experiment.teachers.epochs=1", "experiment.distillation.epochs=1",
)  # fmt: skip


class Backwards:
    """Jobs in this process, which end in another order than they were started in."""

    def __init__(self, study: DistillStudy, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.cells: list[Cell[Any]] = []

    def start(self, cell: Cell[Any]) -> None:
        self.cells.append(cell)

    def finished(self, notify: Notify) -> Iterator[tuple[Cell[Any], Record]]:
        for cell in self.cells[::-1]:
            notify("waiting")
            args = (DistillStudy, self.study.config, str(self.folder), cell.path, cell.seed)
            events, facts = jobs._cell(*args, str(Path.cwd()))
            assert [event for event, _ in events if event == "trained"]
            yield cell, facts


def study_in(path: Path) -> tuple[DistillStudy, StudyFolder[DistillConfig]]:
    study = DistillStudy(make_config(DistillConfig, TINY, [*SHORT, f"output={path}"]))
    return study, StudyFolder.new(study.config)


def hashes(results: Record) -> dict[str, list[str]]:
    return {
        name: [seed["hash"] for _, seed in sorted(row["seeds"].items())]
        for name, row in results["methods"].items()
    }


def test_whatever_ends_first_the_results_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    study, folder = study_in(tmp_path)
    events: list[tuple[str, Any]] = []

    def note(event: str, **facts: Any) -> None:
        events.append((event, facts.get("done")))

    beside = run_study(study, folder, note, Backwards(study, folder.path))
    alone = run_study(*study_in(tmp_path))
    assert hashes(beside) == hashes(alone)
    assert [list(row["seeds"]) for row in beside["methods"].values()] == [["0", "1"]] * 2
    assert beside["finished"]
    assert [done for event, done in events if event == "cell"] == [0, 0, 0, 0, 1, 2, 3, 4, 4]
    assert len([event for event, _ in events if event == "cell_done"]) == 4
    again = run_study(study, folder, jobs=Backwards(study, folder.path))
    assert hashes(again) == hashes(alone)


def test_interrupted_jobs_leave_what_has_ended_and_the_rest_is_run_later(tmp_path: Path) -> None:
    study, folder = study_in(tmp_path)
    waits: list[str] = []

    def interrupting(event: str, **facts: Any) -> None:
        waits.extend([event] * (event == "waiting"))
        if len(waits) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_study(study, folder, interrupting, Backwards(study, folder.path))
    assert [folder.result(cell) is not None for cell in study.cells] == [False] * 3 + [True]
    rest = Backwards(study, folder.path)
    assert run_study(study, folder, jobs=rest)["finished"]
    assert rest.cells == study.cells[:3]


def test_a_device_of_one_number_is_refused_for_jobs_before_ray_starts(tmp_path: Path) -> None:
    words = (*SHORT, f"output={tmp_path}", "experiment.resources.device=cuda:1")
    study = DistillStudy(make_config(DistillConfig, TINY, words))
    with (
        pytest.raises(ConfigError, match="'cuda:1' names none; write cuda"),
        jobs.beside(study, tmp_path, 2, silent),
    ):
        pass


def test_a_task_that_raises_is_not_taken_for_one_that_died() -> None:
    from ray.exceptions import RayTaskError, WorkerCrashedError

    raised = RayTaskError("_cell", "Traceback: …", ValueError("no images\nat all"), "ray", 1, "::1")
    failed = jobs._failed(raised.as_instanceof_cause())
    assert failed["error"] == "ValueError: no images"
    assert "Traceback: …" in failed["traceback"]
    assert "process ended" in jobs._failed(WorkerCrashedError())["error"]


PLUGIN = """
import os
from pathlib import Path

from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss
from fedkd.losses.inputs import loss_function

@loss_function("deadly")
def deadly_loss(student_logits, teacher_logits):
    return (student_logits - teacher_logits).square().mean(dim=1)

@LOSSES.register("deadly")
class Deadly(DistillationLoss, formula=deadly_loss):
    needs = (Logits(),)

    def forward(self, student, teacher, targets, weights):
        deaths = Path("deaths")
        if os.environ["FIRST"] != str(os.getpid()) and len(deaths.read_text()) < LIVES:
            deaths.write_text(deaths.read_text() + "x")
            os.kill(os.getpid(), 9)
        return deadly_loss(student[Logits()], teacher[Logits()])
"""


@pytest.mark.slow
def test_jobs_of_ray_give_the_same_table_and_survive_a_killed_process(
    fedkd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process that dies is begun again; a cell of which two died failed, and is resumed."""
    monkeypatch.setenv("FIRST", str(os.getpid()))
    methods = {"kd": ["ce", "kd"], "deadly": ["ce", "deadly"]}
    values = {**TINY, "methods": methods}
    values["experiment"] = {**TINY["experiment"], "plugins": ["lethal"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    short = ("seeds=[0]", *SHORT[2:])
    tables = {}
    for lives, count in ((0, 1), (1, 2), (2, 2)):
        (tmp_path / "lethal.py").write_text(PLUGIN.replace("LIVES", str(lives)))
        (tmp_path / "deaths").write_text("")
        code, out, err = fedkd(
            "distill", "mine.yaml", *short, f"output=out{lives}", "--jobs", count
        )
        assert (code, len((tmp_path / "deaths").read_text())) == (int(lives == 2), lives), err
        (tables[lives],) = (tmp_path / f"out{lives}").iterdir()
    found = [sorted(re.findall(r'"hash": "\w+"', "".join(
        file.read_text() for file in tables[lives].glob("methods/*/seed0.json")
    ))) for lives in (0, 1)]  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == 3
    assert "deadly, seed 0: its process ended" in out
    code, out, _ = fedkd("distill", "--resume", tables[2], "--trust", "--jobs", 2)
    assert code == 0
    code, out, err = fedkd("distill", "mine.yaml", *short, "--jobs", 99)
    assert code == 2
    assert "--jobs: 99 at once asked for, but Ray sees" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
