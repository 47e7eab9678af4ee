"""A study with a zero-shot teacher out of a file, and a student that a function makes."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from fedkd.config import make_config
from fedkd.io.tensors import file_hash
from fedkd.rounds import silent
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.folder import Place
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.central.training import load_trained
from fedkd.studies.engine import StudyFolder, results_of, run_study
from tests.models.test_weights import CLIP, TINY_CLIP, tiny_clip


def flat(num_classes: int, pixels: int) -> nn.Module:
    """What `target` names."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, num_classes))


def test_a_zero_shot_teacher_and_a_function_for_the_student(tmp_path: Path) -> None:
    clip = str(tmp_path / "clip.safetensors")
    save_file(tiny_clip().state_dict(), clip)
    teacher = {"name": CLIP, "weights": clip, "prompts": "a photo of a {}.", **TINY_CLIP}
    training = {"epochs": 1, "batch_size": 16}
    experiment: dict[str, Any] = {
        "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 8}},
        "teachers": {"models": [teacher], "checkpoints": [clip], **training},
        "student": {"model": {"target": "tests.studies.test_central_files.flat", "pixels": 64}},
        "distillation": training,
        "resources": {"device": "cpu"},
    }
    values = {"name": "zero", "experiment": experiment, "methods": {"kd": ["kd"]}}
    config = make_config(DistillConfig, values)
    study = DistillStudy(config)
    study.check()
    folder = StudyFolder.new(config, tmp_path)
    assert run_study(study, folder, silent)["errors"] == {}
    assert len(results_of(study, folder)["teachers"]) == 1
    assert file_hash(Path(clip)) in json.dumps(folder.read_json("versions.json"))
    student = load_trained(Place.of_student(folder.path, "kd", 0).path)
    assert student.network.head is not None
