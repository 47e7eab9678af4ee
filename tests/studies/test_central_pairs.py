"""Studies whose teachers see another modality than the student."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedkd.config import ConfigError, make_config
from fedkd.distillation.batches import OnlineBatches
from fedkd.knowledge.kinds import Logits
from fedkd.runs.export import export_student
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.central.training import Images, load_trained
from fedkd.studies.engine import StudyFolder, run_study

TRAINING = {"epochs": 2, "batch_size": 16, "augment": "crop"}
STUDY: dict[str, Any] = {
    "name": "pairs",
    "experiment": {
        "data": {
            "pairs": {
                "audio": {"name": "synthetic", "classes": 3, "size": 12, "per_class": 40},
                "image": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 30},
            },
            "train": 48,
        },
        "teachers": {"models": ["cnn_tiny"], "modality": "audio", "train": 100, **TRAINING},
        "student": {"model": "cnn_tiny", "modality": "image"},
        "distillation": TRAINING,
        "resources": {"device": "cpu"},
    },
    "methods": {"kd": ["kd"], "icl": ["ce", "icl"]},
}


def study(*words: str, **values: Any) -> DistillStudy:
    words = tuple(f"experiment.{word}" for word in words)
    return DistillStudy(make_config(DistillConfig, {**STUDY, **values}, words))


def test_pairs_in_use_come_first_on_each_side() -> None:
    images = Images.load(study().config.experiment)
    audio, image = images.sides["audio"], images.sides["image"]
    assert images.modality == "image"
    assert (len(images.train), len(audio.train)) == (48, 48)
    assert (len(image.everything), len(audio.everything)) == (90, 120)
    assert torch.equal(images.train.labels, audio.train.labels)
    assert torch.equal(audio.everything.images[:48], audio.train.images)
    assert torch.equal(images.test.labels, audio.test.labels)
    assert len(audio.for_teacher(0, 100, "here").labels.unique()) == 3


def test_a_study_trains_resumes_and_shows_who_saw_what(tmp_path: Path) -> None:
    made = study()
    made.check()
    folder = StudyFolder.new(made.config, tmp_path)
    found = run_study(made, folder)
    assert found["finished"], found["errors"]
    assert found["teachers"][0]["modality"] == "audio"
    assert "sees audio" in (folder.path / "report.html").read_text()
    again = run_study(study(), StudyFolder.open(folder.path, DistillConfig))
    assert again["methods"] == found["methods"]
    for place, size in (("methods/kd/seed0", 8), ("teachers/0", 12)):
        trained = load_trained(folder.path / place)
        assert trained.shape == (1, size, size)
        assert export_student(trained, "torch", tmp_path / "out.pt2").missing is None


def test_a_student_of_both(tmp_path: Path) -> None:
    made = study("student.modality=[image, audio]", methods={"kd": ["kd"]})
    made.check()
    folder = StudyFolder.new(made.config, tmp_path)
    assert run_study(made, folder)["finished"]
    trained = load_trained(folder.path / "methods" / "kd" / "seed0")
    assert trained.shape == (2, 12, 12)
    assert dict(trained.together) == {"image": (1, 8, 8), "audio": (1, 12, 12)}


def test_a_teacher_answers_about_its_own_side() -> None:
    images = Images.load(study().config.experiment)
    audio = images.sides["audio"]
    from fedkd.config import Component

    deaf = images.network(Component(name="mlp"), 0).eval()
    hearing = audio.network(Component(name="mlp"), 1).eval()
    batches = OnlineBatches(
        images.train, [deaf, hearing], [Logits()], batch_size=8,
        others=[None, audio.train.images],
    )  # fmt: skip
    index = torch.tensor([5, 2, 9])
    answers = batches.batch(index, 1, 0).ensemble.logits
    with torch.no_grad():
        for network, side, found in zip((deaf, hearing), (images, audio), answers, strict=True):
            expected = network.read(side.train.images[index]).logits
            torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"others\[0\]: 3 images beside 48"):
        OnlineBatches(images.train, [hearing], [Logits()], others=[audio.train.images[:3]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.modality=[]"], "student.modality: say which of data.pairs"),
        (["teachers.modality=[]"], "teachers.modality: say which of data.pairs"),
        (["teachers.modality=smell"], "'smell' is none of data.pairs"),
        (["teachers.modality=[audio, image]"], "modality: expected one for each of 1 models"),
        (["data.pairs={}"], "teachers.modality: needs data.pairs"),
        (["data.dataset=mnist"], "data.dataset: 'mnist' is not read"),
        (["data.label_noise={kind: symmetric, rate: 0.4}"], "label_noise: wrong labels would make"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_read(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize("loss", ["vrm", "cat", "fitnet"])
def test_losses_over_maps_and_views_are_refused_by_name(loss: str) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.x: distillation\.losses\.1: loss '{loss}'"):
        study(methods={"x": ["ce", loss]}).check()


def test_too_few_of_a_class_is_named() -> None:
    with pytest.raises(ConfigError, match=r"experiment\.data\.pairs: image: 40 images of class"):
        Images.load(study("data.train=120", "student.modality=audio").config.experiment)
