"""Cells of a study that were run apart, as one study."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedkd.config import ConfigError, make_config
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.engine import StudyFolder, run_study
from fedkd.studies.merging import merge

TRAINING = {"epochs": 1, "batch_size": 16, "augment": "none"}
CONFIG: dict[str, Any] = {
    "experiment": {
        "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 20}},
        "teachers": {"models": ["mlp"], **TRAINING},
        "student": {"model": "mlp"},
        "distillation": TRAINING,
        "resources": {"device": "cpu"},
    },
    "methods": {"kd": ["ce", "kd"]},
}


def run(parent: Path, *words: str) -> Path:
    study = DistillStudy(make_config(DistillStudy.config_class, CONFIG, words))
    folder = StudyFolder.new(study.config, parent)
    assert run_study(study, folder)["finished"]
    return folder.path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("parts")
    return [run(parent, f"seeds={seed}", f"name=part{seed}") for seed in (1, 0)]


def students(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    assert found["finished"]
    return {
        (name, seed): record["hash"]
        for name, row in found["methods"].items()
        for seed, record in row["seeds"].items()
    }


def test_what_was_run_apart_is_what_is_run_in_one(
    parts: list[Path], tmp_path: Path, fedkd: Any
) -> None:
    code, out, err = fedkd("merge", *parts, "--into", tmp_path / "whole")
    assert (code, err) == (0, "")
    assert f"report  {tmp_path / 'whole' / 'report.html'}" in out
    assert (tmp_path / "whole" / "report.html").is_file()
    assert students(tmp_path / "whole") == students(run(tmp_path, "seeds=[0,1]"))
    # Nothing is left to do, and it goes on like any study.
    code, out, _ = fedkd("distill", "--resume", tmp_path / "whole")
    assert code == 0


def test_what_does_not_belong_together_is_refused_by_name(
    parts: list[Path], tmp_path: Path
) -> None:
    first, second = parts

    def refused(reason: str, *paths: Path, into: Path = tmp_path / "whole") -> None:
        with pytest.raises(ConfigError, match=reason):
            merge(DistillStudy, paths, into)
        assert not (tmp_path / "whole").exists()

    refused("two folders", first)
    refused("given twice", first, first)
    refused("is there already", first, second, into=first)
    again = Path(shutil.copytree(first, tmp_path / "again"))
    refused(r"again: student, seed 1 is finished here and in .*part1", first, again)
    config = again / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("batch_size: 16", "batch_size: 8"))
    refused(r"experiment\.\w+\.batch_size is 8, in .* it is 16", second, again)
    config.write_text(text)
    images = again / "images.json"
    prints = json.loads(images.read_text())
    prints["data"]["training"] = "other"
    images.write_text(json.dumps(prints))
    refused(r"again: its images \(data\) are not those of", second, again)
