"""Rounds in which teachers and student are adapters beside a frozen network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fedkd.config import ConfigError
from fedkd.models import MODELS
from fedkd.models.staged import StagedClassifier
from fedkd.runs.directory import RunDirectory, load_state
from fedkd.runs.events import RoundFinished
from fedkd.runs.export import Trained, export_student
from fedkd.simulations.local import run_local
from tests.conftest import Shared, Tiny

pytestmark = pytest.mark.usefixtures("lean")

LORA = "{name: brought, peft: {method: lora, r: 2}}"
ADAPTED = (
    f"teachers.models=[{LORA}]",
    f"student.model={LORA}",
    "teachers.feedback.use=init",
    "distillation.losses=[ce, kd]",
)


def brought(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Of a plugin, which knows where its weights are from."""
    stages: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU()),
    ]
    return StagedClassifier(stages, 64, num_classes)


@pytest.fixture(scope="module", autouse=True)
def _plugin() -> Iterator[None]:
    MODELS.register("brought")(brought)
    yield
    del MODELS._members["brought"]


def test_files_and_messages_hold_what_learns(shared: Shared) -> None:
    run = shared(*ADAPTED)
    saved = load_state(run.path / "checkpoints" / "round-0002.pt")["student"]
    kept = load_state(run.clients / "client-0001" / "teacher-0002.pt")["weights"]
    layers = ("stage1.1", "stage2.1")
    factors = {f"body.{n}.lora_{f}.default.weight" for n in layers for f in "AB"}
    names = {*factors, "body.head.weight", "body.head.bias", "mean", "std", "base.sha256"}
    assert set(saved) == set(kept) == names
    assert torch.equal(saved["base.sha256"], kept["base.sha256"])
    learnt = sum(t.numel() for name, t in saved.items() if name.startswith("body"))
    costs = run.read_json("summary.json")["costs"]["networks"]
    assert {each["trainable"] for each in costs} == {learnt}
    assert learnt < 0.2 * costs[0]["parameters"]
    sent = {m.down for m in run.messages() if (m.round, m.phase) == (2, "train")}
    alone = {m.down for m in run.messages() if (m.round, m.phase) == (1, "train")}
    # Names and Flower's own headers come to less than 500 bytes a tensor.
    assert max(sent) - min(alone) < 4 * learnt + 500 * len(names)
    assert max(sent) - min(alone) < 2 * costs[0]["parameters"]


def test_a_resumed_run_reaches_the_same_adapters(tiny: Tiny, shared: Shared) -> None:
    class Stop(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "phase" and facts["round"] == 2 and facts["phase"] == "distil":
            raise Stop

    run = RunDirectory.new(tiny(*ADAPTED))
    with pytest.raises(Stop):
        run_local(run.experiment, run=run, notify=stop)
    resumed = run_local(run.experiment, run=RunDirectory.open(run.path))
    hashes = [event.hash for event in resumed.events(RoundFinished)]
    assert hashes == [event.hash for event in shared(*ADAPTED).events(RoundFinished)]


def test_an_exported_student_needs_no_adapters(shared: Shared, tmp_path: Path) -> None:
    student = Trained.of(shared(*ADAPTED))
    exported = export_student(student, "torch", tmp_path / "student.pt2")
    assert exported.difference < 1e-5
    names = torch.export.load(exported.path).state_dict
    assert not any("lora" in name for name in names)


def test_other_feedback_reaches_adapted_teachers(tiny: Tiny) -> None:
    words = (*ADAPTED[:2], ADAPTED[3], "teachers.feedback.use=regulariser")
    assert len(run_local(tiny(*words)).events(RoundFinished)) == 2


def test_clients_of_one_base_train_together(tiny: Tiny, shared: Shared) -> None:
    run = run_local(tiny(*ADAPTED, "resources.batch_clients=on"))
    ends = [each.events(RoundFinished)[-1] for each in (run, shared(*ADAPTED))]
    assert ends[0].student.accuracy == pytest.approx(ends[1].student.accuracy, abs=0.1)


def test_budgets_are_spent_on_adapters_alone(tiny: Tiny) -> None:
    promise = "teachers.privacy={epsilon: 8, nominal_size: 40, accountant: rdp}"
    words = (*ADAPTED[:2], ADAPTED[3], promise, "fusion=[uniform]", "evaluation.clients=false")
    run = run_local(tiny(*words, "rounds=1", "teachers.batch_size=20"))
    record = run.read_json("privacy.json")
    assert record["assumes"].endswith("; the frozen weights show no private images")
    assert 0 < record["worst"] <= 8
    with pytest.raises(ConfigError, match=r"stem\.1 \(BatchNorm2d\) learns, and Opacus has no"):
        run_local(tiny(*words[1:], "teachers.models=[{name: brought, peft: norm}]"))
