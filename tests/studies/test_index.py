"""A page over a folder of runs: what is there, what is damaged, curves, configs that differ."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedkd.config import ConfigError, make_experiment
from fedkd.reporting.script import SCRIPT
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import MessageCounted, RoundFinished
from fedkd.studies.index import write_index
from fedkd.training.evaluation import Scores
from tests.conftest import TINY


def made(parent: Path, name: str, *accuracies: float, **changes: Any) -> RunDirectory:
    """A run that is under way, with these accuracies."""
    words = [f"name={name}", *(f"{key.replace('__', '.')}={v}" for key, v in changes.items())]
    run = RunDirectory.new(make_experiment(TINY, words), parent)
    for number, accuracy in enumerate(accuracies, start=1):
        run.count(MessageCounted(round=number, phase="knowledge", client=0, down=0, up=1_000_000))
        run.count(MessageCounted(round=number, phase="evaluate", client=0, down=0, up=9_000_000))
        run.record(RoundFinished(round=number, student=Scores(accuracy=accuracy)))
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looked-at")
    run = made(folder, "first", 0.25, 0.75)
    (run.path / "report.html").write_text("its page")
    made(folder / "more", "second", 0.5, seed=3, teachers__epochs=9)
    made(folder, "broken", 0.5).path.joinpath("metrics.jsonl").write_text('{"event": "round"}\n')
    study = folder / "methods-20260101-000000-abcd"
    study.mkdir()
    (study / "config.yaml").write_text("study: compare\nname: methods\n")
    row = {"final": {"mean": 0.625, "std": 0.01, "n": 3}}
    (study / "results.json").write_text(
        json.dumps({"finished": True, "seeds": [0, 1, 2], "errors": {}, "rows": {"ours": row}})
    )
    (folder / "wandb" / "x").mkdir(parents=True)
    (folder / "wandb" / "x" / "config.yaml").write_text("no run: true\n")
    (folder / "link").symlink_to(run.path)
    write_index(folder)
    return folder


@pytest.fixture
def text(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr class[^>]*>(.*?)</tr>", text, re.DOTALL)
    plain = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in row] for row in plain]


def test_each_run_and_study_is_a_row_and_nothing_else(text: str) -> None:
    rows = {row[1].split("-")[0].split()[0]: row for row in cells(text)}
    assert set(rows) == {"first", "second", "broken", "methods"}
    assert rows["first"][2:5] == ["75.0 %", "2 of 2 rounds", "run"]
    assert rows["first"][8] == "2.0 MB"  # what only measures does not count
    assert rows["second"][1].split()[1].startswith("more/second-seed3-")
    assert rows["methods"][2:5] == ["62.50 ± 1.00 % ours, 3 seeds", "complete", "compare"]


def test_a_damaged_run_is_a_row_with_its_reason(text: str) -> None:
    (row,) = (row for row in cells(text) if row[1].startswith("broken"))
    assert row[3].startswith("metrics.jsonl, line 1")
    assert "1 of them cannot be read" in text


def test_links_lead_to_pages_from_where_the_index_lies(folder: Path, tmp_path: Path) -> None:
    for out in (folder / "index.html", tmp_path / "elsewhere.html"):
        page = write_index(folder, out).read_text(encoding="utf-8")
        (link,) = re.findall(r'<td[^>]*><a href="([^"]+)"', page)
        assert (out.parent / link).read_text() == "its page"


def test_curves_and_configs_are_there_to_be_chosen(text: str) -> None:
    series = re.findall(r'<tr class[^>]*data-series="([^"]+)"', text)
    assert sorted(label.split()[1] for label in series) == ["first-seed0", "second-seed3"]
    figures = [json.loads(values) for values in re.findall(r"data-values='([^']+)'", text)]
    assert len(figures) == 2
    by_name = {s["n"].split()[1]: s["t"] for s in figures[0]["series"]}
    assert by_name["first-seed0"] == ["round 1 · 25.0 %", "round 2 · 75.0 %"]
    by_name = {s["n"].split()[1]: s["t"] for s in figures[1]["series"]}
    assert by_name["first-seed0"] == ["MB 1 · 25.0 %", "MB 2 · 75.0 %"]
    (found,) = re.findall(r"data-configs='([^']+)'", text)
    configs = {label.split()[1]: values for label, values in json.loads(found).items()}
    assert configs["second-seed3"]["teachers.epochs"] == 9
    assert configs["first-seed0"]["teachers.epochs"] == 2
    assert "output" not in configs["first-seed0"]
    assert text.count("<script") == 1
    assert "http" not in text.replace(SCRIPT, "").replace("http-equiv", "")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nowhere", "is no folder; give the one that holds runs"),
        ("empty", "holds no run and no study"),
        ("run", "is itself a run or study; give the folder that it lies in"),
    ],
)
def test_what_is_no_folder_of_runs_is_refused(tmp_path: Path, what: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    given = made(tmp_path, "alone").path if what == "run" else tmp_path / what
    with pytest.raises(ConfigError, match=message):
        write_index(given)
