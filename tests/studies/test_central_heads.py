"""A student with several heads in one place: teachers of one task each, a study, a page, a file."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedkd.config import ConfigError, make_config
from fedkd.runs.export import predict_files
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.report import make_page
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.central.training import load_trained
from fedkd.studies.engine import StudyFolder, run_study

ONCE = {"epochs": 1, "batch_size": 16, "augment": "none"}
TERMS = [{"name": name, "head": head} for head in ("digit", "odd") for name in ("ce", "kd")]
TINY: dict[str, Any] = {
    "name": "heads",
    "experiment": {
        "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 20}},
        "teachers": {"models": ["mlp", "mlp"], **ONCE},
        "student": {
            "model": "mlp",
            "heads": {"digit": "classes", "odd": {"no": [0, 2], "yes": [1]}},
        },
        "distillation": ONCE,
        "resources": {"device": "cpu"},
    },
    "methods": {
        "both": {"distillation.losses": TERMS, "distillation.generations": 2},
        "digit": TERMS[:2],
    },
}


def study(*words: str) -> DistillStudy:
    return DistillStudy(make_config(DistillConfig, TINY, list(words)))


def test_a_study_of_heads(tmp_path: Path) -> None:
    made = study(f"output={tmp_path}")
    made.check()
    folder = StudyFolder.new(made.config)
    found = run_study(made, folder)
    assert [list(row["heads"]) for row in found["teachers"]] == [["digit"], ["odd"]]
    assert list(found["methods"]["both"]["heads"]) == ["digit", "odd"]
    assert list(found["methods"]["digit"]["heads"]) == ["digit"]
    both = found["methods"]["both"]
    each = [row["mean"] for row in both["heads"].values()]
    assert both["last"]["mean"] == pytest.approx(sum(each) / 2)
    assert both["losses"][0]["name"] == "ce (digit)"
    titles = {section.title for section in make_page(made.config, folder.path, found).sections}
    assert "Heads" in titles
    trained = load_trained(folder.path / "methods" / "both" / "seed0")
    assert trained.heads == {"digit": 3, "odd": 2}
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    ((_, named),) = predict_files(trained, [tmp_path / "black.png"], top=1)
    assert [name.split(":")[0] for name, _ in named] == ["digit", "odd"]
    assert load_trained(folder.path / "teachers" / "1").test().classes == ("odd: no", "odd: yes")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("experiment.teachers.heads=digit", "student.heads.odd: none of 2 teachers knows"),
        ("experiment.teachers.heads=[digit, even]", "teachers.heads: there is no head 'even'"),
        (
            "experiment.student.heads={digit: classes, odd: {0: [0], 1: [1]}}",
            "odd: is silent",
        ),
        ("experiment.student.heads={odd: {no: [0], yes: [1]}}", "heads.odd: YAML reads yes, no"),
        ("experiment.distillation.unlabelled=3", "distillation.unlabelled: must be 0 with stud"),
        ("experiment.teachers.classes=[[0, 1], [1, 2]]", "teachers.classes: must be null with"),
        ("methods.kd=[ce, kd]", "methods.kd: distillation.losses.0: loss 'ce' compares classes"),
        ("methods.kd=[{name: ce, head: even}]", "losses.0.head: there is no head 'even'"),
    ],
)
def test_what_a_study_of_heads_cannot_have(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(word).check()
