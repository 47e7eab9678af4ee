"""Numbers that are not finite are reported as those of whoever gave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.build import build_network
from fedkd.config import ConfigError, Experiment, make_experiment
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import OnlineBatches, TransferBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import distill
from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Kind, Logits, Pooled
from fedkd.knowledge.payload import Bank, Ensemble, Fused, Knowledge, Teacher, fuse
from fedkd.rounds import Client, ExperimentContext
from fedkd.training.evaluation import accuracy, agreement, calibration, per_class_accuracy
from tests.conftest import TINY

BAD = [float("nan"), float("inf"), float("-inf")]


class Masked(nn.Module):
    """Gives one number to class 1 of every image that has a bright first pixel."""

    def __init__(self, number: float, share: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3)
        self.number = number
        self.share = share

    def forward(self, images: Tensor) -> Tensor:
        logits = self.inner(images.flatten(1))
        mask = torch.zeros_like(logits, dtype=torch.bool)
        mask[: max(1, round(self.share * len(logits))), 1] = True
        return logits.masked_fill(mask, self.number)


@pytest.fixture
def images() -> ImageSet:
    return fedkd.load_dataset("synthetic", classes=3, size=8, per_class=10)[0]


@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize("loss", ["kd", "dkd", "ce"])
def test_a_teacher_handed_over_is_named(images: ImageSet, number: float, loss: str) -> None:
    """Also by a loss that looks at no teacher: its targets are the teachers' winners."""
    teachers = [fedkd.network("mlp", images), Masked(number)]
    with pytest.raises(ValueError, match=r"teacher.*1.*(logits|finite)") as error:
        fedkd.train_student("mlp", teachers, images.unlabelled(), losses=[loss], epochs=1)
    assert "learning rate" not in str(error.value)


@pytest.mark.parametrize("number", BAD)
def test_a_live_teacher_is_named(images: ImageSet, number: float) -> None:
    teachers = [fedkd.network("mlp", images).eval(), fedkd.network(Masked(number), images).eval()]
    batches = OnlineBatches(images, teachers, (Logits(),))
    objective = Objective([Term("kd", fedkd.LOSSES.create("kd"))])
    with pytest.raises(RuntimeError, match=rf"teacher 1 gives {number} as logits for image 0 of"):
        distill(fedkd.network("mlp", images), batches, objective, epochs=1)


@pytest.mark.parametrize("kind", [Logits(), Pooled()])
def test_knowledge_held_in_memory_is_looked_at(kind: Kind) -> None:
    tensors = {Logits(): torch.zeros(5, 3), Pooled(): torch.zeros(5, 2)}
    tensors[kind][3, 1] = torch.nan
    whole = Knowledge(Teacher(0), {k: torch.zeros_like(t) for k, t in tensors.items()})
    with pytest.raises(ValueError, match=rf"teacher 7 gives nan as {kind} for image 3 "):
        Bank.of([whole, Knowledge(Teacher(7), tensors)])


def test_lessons_look_at_what_the_teachers_say_together(images: ImageSet) -> None:
    logits = torch.zeros(30, 3)
    logits[4, 2] = torch.nan
    with pytest.raises(ValueError, match="teacher 6 gives nan as logits for image 4"):
        TransferBatches(images.images, Fused.of(Teacher(6), logits))


def test_a_fusion_rule_is_named_where_the_teachers_are_right() -> None:
    def rule(ensemble: Ensemble) -> Ensemble:
        return ensemble.weighted(torch.full_like(ensemble.weights, torch.inf))

    bank = Bank.of([Knowledge(Teacher(0), {Logits(): torch.zeros(5, 3)})])
    with pytest.raises(ValueError, match="fusion: the rules gave probabilities that are not fin"):
        fuse(bank, [rule])


@pytest.mark.parametrize(
    "measure", [accuracy, per_class_accuracy, calibration, lambda p, _labels: agreement([p, p])]
)
def test_predictions_that_are_none_are_not_scored(measure: Callable[..., object]) -> None:
    predictions = torch.zeros(4, 3)
    predictions[2] = torch.nan
    with pytest.raises(ValueError, match="1 of 4 rows are NaN"):
        measure(predictions, torch.zeros(4, dtype=torch.long))
    predictions[2] = torch.tensor([0.0, -torch.inf, -1.0])  # a masked class is an answer
    measure(predictions, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("use", ["init", "regulariser", "align"])
def test_a_client_learns_nothing_from_a_student_that_is_not_finite(
    tiny: Callable[..., Experiment], use: str, tmp_path: Path
) -> None:
    workspace = ExperimentContext(
        tiny("teachers.models=[mlp]", "student.model=mlp", f"teachers.feedback.use={use}")
    )
    student = fedkd.network("mlp", workspace.data.test)
    state = {
        name: t * torch.nan if "weight" in name else t for name, t in student.state_dict().items()
    }
    client = Client(workspace, 0, "run", tmp_path)
    with pytest.raises(
        RuntimeError, match=r"client 0: the student that the server sent has weights"
    ):
        client.train(2, state)
    assert not list(tmp_path.iterdir())


def _refused(*overrides: str) -> str:
    plain = [
        "teachers.models=[mlp]",
        "student.model=mlp",
        "distillation.losses=[kd]",
        "distillation.epochs=9",
    ]
    with pytest.raises(ConfigError) as error:
        ExperimentContext(make_experiment(TINY, [*plain, *overrides]))
    return str(error.value)


def test_batches_of_one_are_refused_by_their_key_before_work_starts() -> None:
    norm = "{name: cnn_tiny, norm: batch}"
    one = "distillation.batch_size=1"
    assert "teachers.batch_size: teachers.models.0 'cnn_tiny' has batch norm" in _refused(
        "teachers.batch_size=1", f"teachers.models=[{norm}]"
    )
    assert "distillation.batch_size: student.model 'cnn_tiny' has batch norm" in _refused(
        one, f"student.model={norm}"
    )
    assert "distillation.batch_size: distillation.assistants 'cnn_tiny' has" in _refused(
        one, f"distillation.assistants=[{norm}]"
    )
    assert "distillation.batch_size: is 1, but loss 'rkd' learns from" in _refused(
        one, "distillation.losses=[kd, {name: rkd, start: 3}]"
    )
    assert "data.transfer.images: there is only one, but loss 'sp'" in _refused(
        "data.transfer.size=1",
        "student.model=cnn_tiny",
        "teachers.models=[cnn_tiny]",
        "distillation.losses=[sp]",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teachers.optimizer={nesterov: true, momentum: 0}", "nesterov: needs name sgd and a mom"),
        ("distillation.optimizer={name: adam, nesterov: true}", "nesterov: needs name sgd"),
    ],
)
def test_options_that_would_be_ignored_are_refused(override: str, message: str) -> None:
    assert message in _refused(override)


@pytest.mark.parametrize("late", [{"start": 4}, {"start": 3, "stop": 2}])
def test_a_loss_that_never_counts_is_refused(late: dict[str, int]) -> None:
    terms = [Term("ce", fedkd.LOSSES.create("ce")), Term("kd", fedkd.LOSSES.create("kd"), **late)]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss 'kd' never counts: it starts in epoch"):
        Objective(terms).check(3)


def test_a_client_trains_on_batches_of_one(tiny: Callable[..., Experiment], tmp_path: Path) -> None:
    workspace = ExperimentContext(
        tiny("student.model=mlp", "teachers={models: [mlp], batch_size: 1, epochs: 1}")
    )
    fresh = build_network(
        workspace.experiment, workspace.experiment.student.model, workspace.data, "teacher", 0
    )
    client = Client(workspace, 0, "run", tmp_path)
    assert client.train(1).loss > 0
    trained = load_state(tmp_path / "teacher-0001.pt")["weights"]
    assert all(
        not tensor.equal(trained[name])
        for name, tensor in fresh.state_dict().items()
        if name not in ("mean", "std")
    )
