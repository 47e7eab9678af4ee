"""Studies whose networks learn from labels of which some are wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedkd.config import ConfigError
from fedkd.rounds import Interrupted
from fedkd.studies.central.folder import Place
from fedkd.studies.central.training import load_trained
from fedkd.training.noisy.pair import both_of
from tests.studies.test_central import Done, study

UNLEARN = "unlearn: {start: 3, period: 3, length: 2}"
WORDS = (
    "data.label_noise={kind: symmetric, rate: 0.5}",
    "teachers.epochs=9",
    f"teachers.noisy={{partner: mlp, warmup: 2, {UNLEARN}}}",
    "student.model={name: cnn_tiny, norm: batch, width: 4}",
    "distillation.epochs=9",
)
ALONE = {"distillation.losses": ["ce"]}
METHODS: dict[str, Any] = {
    "kd": ["ce", "kd"],
    "acdu": {
        **ALONE,
        "distillation.noisy": {
            "partner": "mlp", "warmup": 2, "unlearn": {"start": 3, "period": 3, "length": 2}
        },
    },
    "gmm": {**ALONE, "distillation.noisy": {"method": "gmm", "warmup": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = Done(study(*WORDS, methods=METHODS), tmp_path_factory.mktemp("noisy"))
    done.run()
    return done


def test_a_teacher_answers_as_a_pair_and_a_student_is_one_network(finished: Done) -> None:
    teacher = load_trained(finished.path / "teachers" / "0").network
    assert both_of(teacher) is not None
    assert both_of(load_trained(finished.student("acdu", 0).path).network) is None
    lines = Place.of_teacher(finished.path, 0, None).epochs()
    assert [line["noisy"]["phase"] for line in lines] == (
        ["warm-up"] * 2 + ["learning"] * 4 + ["unlearning"] * 2 + ["learning"]
    )
    assert [line["accuracy"] for line in lines] == [
        line["noisy"]["accuracy_both"] for line in lines
    ]
    own = finished.student("acdu", 0).epochs()
    assert [line["accuracy"] for line in own] == [line["noisy"]["accuracy_a"] for line in own]
    assert 0 < own[-1]["noisy"]["purity_a"] <= 1
    assert finished.results["methods"]["gmm"]["last"] is not None


def test_the_page_shows_what_became_of_the_labels(finished: Done) -> None:
    page = finished.page()
    for text in ("acdu: What became of the labels", "labels called clean", "from scratch"):
        assert text in page
    assert len(re.findall("<h3>[^<]*Losses on the given labels[^<]*</h3>", page)) == 3


def test_a_pair_of_a_study_answers_from_its_file_as_it_did(finished: Done) -> None:
    teacher = load_trained(finished.path / "teachers" / "0").network
    images = finished.study.images(0)["data"]["test"]
    with torch.no_grad():
        right = (teacher(images.images).argmax(1) == images.labels).double().mean()
    last = Place.of_teacher(finished.path, 0, None).epochs()[-1]["accuracy"]
    assert float(right) == pytest.approx(last)


@pytest.mark.parametrize("stop", [7])
def test_an_interrupted_student_goes_on_to_the_same_one(
    finished: Done, tmp_path: Path, stop: int
) -> None:
    """While it unlearns."""
    done = Done(study(*WORDS, "only=[acdu]", methods=METHODS), tmp_path)

    def listen(event: str, **facts: Any) -> None:
        if event == "epoch" and facts["label"].startswith("acdu") and facts["epoch"] == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        done.run(listen)
    again = done.again()
    again.run()
    same = [finished.student("acdu", 0), again.student("acdu", 0)]
    assert same[0].result()["hash"] == same[1].result()["hash"]
    assert [e["noisy"] for e in same[0].epochs()] == [e["noisy"] for e in same[1].epochs()]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["teachers.epochs=6"], r"experiment.teachers.*noisy.unlearn.start: nothing is ever"),
        (["teachers.precision=bfloat16"], "noisy: computes in float32 and is not compiled"),
        (["teachers.checkpoints=[t.pt]"], "noisy: a teacher with a checkpoint is not trained"),
        (["distillation.noisy={method: gmm}"], r"noisy: such a student learns from the given"),
        (["teachers.models=[cnn_tiny]"], "teachers.noisy: 'cnn_tiny' has neither batch norm"),
        (["student.model=cnn_tiny"], "methods.acdu: distillation.noisy: 'cnn_tiny' has neither"),
        (["teachers.noisy.partner=mpl"], "teachers.noisy.partner.model: unknown model 'mpl'"),
        (
            ["methods.kd=[{name: fitnet}]"],
            r"methods.kd: stage\(index=-2\) cannot be read from teacher 0: it has 0 stages",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    words: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        study(*WORDS, *words, methods=METHODS).check()
