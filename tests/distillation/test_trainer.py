"""The student's loop, the objective and the notebook API."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import OnlineBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import EpochRecord, Snapshot, distill
from fedkd.knowledge.kinds import Logits, Reading, VirtualLogits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.kd import kd_loss
from fedkd.runs.directory import network_hash
from fedkd.training.evaluation import agreement, predict
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import align, fit

Patterns = tuple[ImageSet, ImageSet]


@pytest.fixture
def patterns() -> tuple[ImageSet, ImageSet]:
    return fedkd.load_dataset("synthetic", classes=3, size=8, per_class=40)


def ensemble(teachers: int, samples: int = 6, classes: int = 4) -> Ensemble:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(teachers, samples, classes, generator=generator)
    weights = torch.softmax(torch.randn(teachers, samples, generator=generator), 0)
    who = tuple(Teacher(number) for number in range(teachers))
    return Ensemble(who, {Logits(): logits, VirtualLogits(0): logits.flip(1)}, weights)


def test_many_teachers_pull_as_their_weighted_mean_of_probabilities() -> None:
    """The gradient of a sum of KLs is the gradient of one KL to the mean of probabilities."""
    many = ensemble(3)
    objective = Objective([Term("kd", fedkd.LOSSES.create("kd", temperature=1.0))])
    student = torch.zeros(6, 4, requires_grad=True)
    objective({Logits(): student}, many, None, 1, 1).total.backward()
    one = torch.zeros(6, 4, requires_grad=True)
    kd_loss(one, many.mean_probabilities().log(), temperature=1.0).mean().backward()
    assert torch.allclose(student.grad, one.grad, atol=1e-6)  # type: ignore[arg-type]


def test_order_of_teachers_does_not_matter_to_the_objective() -> None:
    many = ensemble(3)
    order = [2, 0, 1]
    shuffled = Ensemble(
        tuple(many.teachers[i] for i in order),
        {kind: torch.stack([tensor[m] for m in order]) for kind, tensor in many.tensors.items()},
        many.weights[order],
    )
    objective = Objective([Term(n, fedkd.LOSSES.create(n)) for n in ("dkd", "vrm")])
    student = {kind: torch.randn(6, 4) for kind in objective.reads}
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    one, two = (objective(student, each, targets, 1, 1).total for each in (many, shuffled))
    assert torch.allclose(one, two, rtol=1e-5)


def test_a_loss_without_teacher_is_counted_once() -> None:
    objective = Objective([Term("ce", fedkd.LOSSES.create("ce"))])
    student = {Logits(): torch.randn(6, 4)}
    targets = torch.arange(6) % 4
    value = objective(student, ensemble(5), targets, 1, 1).total
    assert torch.allclose(value, nn.functional.cross_entropy(student[Logits()], targets))


def test_warm_up_rises_linearly_and_terms_are_logged_unweighted() -> None:
    term = Term("kd", fedkd.LOSSES.create("kd"), weight=2.0, warmup=4)
    assert [term.weight_at(epoch, 9) for epoch in (1, 2, 4, 9)] == [0.5, 1.0, 2.0, 2.0]
    objective = Objective([term])
    student = {Logits(): torch.randn(6, 4)}
    value = objective(student, ensemble(2), None, 1, 9)
    assert torch.allclose(value.total, 0.5 * value.terms["kd"])
    assert value.weights == {"kd": 0.5}


def test_a_term_counts_from_start_to_stop_and_decays_along_a_cosine() -> None:
    kd = fedkd.LOSSES.create("kd")
    hint = Term("kd", kd, stop=2)
    assert [hint.weight_at(epoch, 4) for epoch in (1, 2, 3, 4)] == [1, 1, 0, 0]
    late = Term("kd", kd, weight=2.0, start=3, warmup=2)
    assert [late.weight_at(epoch, 6) for epoch in (2, 3, 4, 6)] == [0, 1, 2, 2]
    fading = Term("kd", kd, decay_from=2)
    assert [fading.weight_at(epoch, 6) for epoch in (1, 2, 4, 6)] == pytest.approx([1, 1, 0.5, 0])


def test_a_term_that_does_not_count_costs_nothing_and_an_empty_epoch_is_an_error() -> None:
    kd, ce = fedkd.LOSSES.create("kd"), fedkd.LOSSES.create("ce")
    objective = Objective([Term("kd", kd, stop=1), Term("ce", ce, start=3)])
    value = objective({Logits(): torch.randn(6, 4)}, ensemble(2), torch.arange(6) % 4, 3, 3)
    assert set(value.terms) == {"ce"}
    with pytest.raises(ValueError, match="no loss counts in epoch 2 of 3"):
        objective.check(3)


def test_a_loss_may_bring_parameters_and_they_are_trained(patterns: Patterns) -> None:
    class Shifted(DistillationLoss):
        needs = (Logits(),)

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(
            self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: TeacherWeights
        ) -> Tensor:
            return (student[Logits()] + self.shift - teacher[Logits()]).square().mean(1)

    train, _ = patterns
    loss = Shifted()
    teacher = fedkd.network("mlp", train)
    fedkd.train_student("cnn_tiny", [teacher], train.unlabelled(), losses=[loss], epochs=1)
    assert loss.shift.abs().sum() > 0


def test_a_list_of_modules_teaches_a_student_without_flower(patterns: Patterns) -> None:
    train, test = patterns

    def mine() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

    transfer = train.subset(torch.arange(0, len(train), 2)).unlabelled()
    private = train.subset(torch.arange(1, len(train), 2))
    teachers = [fedkd.network(model, transfer, seed=n) for n, model in enumerate([mine(), "mlp"])]
    for teacher in teachers:
        fedkd.train_teacher(teacher, private, epochs=5)
    before = [network_hash(teacher) for teacher in teachers]

    def strongest(item: Ensemble) -> Ensemble:
        best = item.logits.softmax(-1).amax(-1)
        return item.weighted(best)

    student = fedkd.train_student(
        mine(), teachers, transfer, losses=["dkd", "vrm"], fusion=["uniform", strongest], epochs=40
    )
    assert fedkd.evaluate(student, test) > 0.8  # chance is 0.33
    assert [network_hash(teacher) for teacher in teachers] == before


@pytest.mark.smoke
def test_the_same_seed_gives_the_same_student(patterns: Patterns) -> None:
    train, _ = patterns
    teacher = fedkd.network("mlp", train)

    def go(seed: int) -> str:
        torch.rand(3)  # the global generator must not matter
        student = fedkd.train_student(
            "cnn_tiny", [teacher], train.unlabelled(), epochs=1, seed=seed
        )
        return network_hash(student)

    assert go(0) == go(0) != go(1)


def test_a_diverging_student_is_an_error_that_names_the_terms(patterns: Patterns) -> None:
    train, _ = patterns
    teacher = fedkd.network("mlp", train)
    with pytest.raises(RuntimeError, match=r"loss is (nan|inf).*kd.*lower the learning rate"):
        fedkd.train_student(
            "mlp", [teacher], train.unlabelled(), losses=["kd"], epochs=20,
            optimizer=Optimizer(lr=1e12, schedule="constant"),
        )  # fmt: skip


def test_a_reading_computes_only_what_is_read(patterns: Patterns) -> None:
    train, _ = patterns
    network = fedkd.network("mlp", train)
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    reading = Reading(network, train.images[:4], lambda number: train.images[4:8])
    Logits().read(reading)
    Logits().read(reading)
    assert len(calls) == 1
    VirtualLogits(0).read(reading)
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="no virtual views"):
        VirtualLogits(0).read(Reading(network, train.images[:4]))


def test_labels_of_a_labelled_transfer_set_are_used(patterns: Patterns) -> None:
    train, test = patterns
    confused = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    student = fedkd.train_student("mlp", [confused], train, losses=["ce"], epochs=5)
    assert fedkd.evaluate(student, test) > 0.8


def test_gradients_of_terms_are_logged_and_add_up_with_their_weights(patterns: Patterns) -> None:
    train, _ = patterns
    teacher = fedkd.network("mlp", train)
    records: list[EpochRecord] = []
    kd = fedkd.LOSSES.create("kd")
    fedkd.train_student(
        "mlp", [teacher], train.unlabelled(), epochs=2, on_epoch=records.append,
        losses=[Term("one", kd), Term("three", kd, weight=3.0)],
    )  # fmt: skip
    for record in records:
        assert record.gradients["one"] > 0
        assert record.gradients["three"] == pytest.approx(3 * record.gradients["one"])
        assert record.terms["three"] == pytest.approx(record.terms["one"])


def test_a_call_resumed_from_a_snapshot_ends_in_the_same_student(patterns: Patterns) -> None:
    train, _ = patterns
    teachers = [fedkd.network("cnn_tiny", train, seed=n, width=4) for n in (0, 1)]

    def call(**options: Any) -> tuple[str, dict[int, Any]]:
        student = fedkd.network("cnn_tiny", train, seed=3, norm="batch")
        batches = OnlineBatches(train, teachers, objective.needs, augment="crop", seed=5)
        kept: dict[int, Any] = {}

        def keep(record: EpochRecord, snapshot: Snapshot) -> None:
            kept[record.epoch] = snapshot()

        distill(student, batches, objective, epochs=3, seed=5, on_epoch=keep, **options)
        return network_hash(student), kept

    objective = Objective(
        [Term(name, fedkd.LOSSES.create(name)) for name in ("ce", "kd", "cat", "mmkd")]
    )
    whole, kept = call()
    assert call(resume=kept[1])[0] == call(resume=kept[2])[0] == whole


def test_what_was_learnt_about_some_teachers_is_not_believed_of_others() -> None:
    objective = Objective([Term("mmkd", fedkd.LOSSES.create("mmkd"))])

    def adapt(clients: list[int]) -> dict[str, Tensor]:
        many = ensemble(len(clients))
        who = tuple(Teacher(client) for client in clients)
        objective.adapt({Logits(): torch.zeros(6, 4)}, replace(many, teachers=who), seed=0)
        return {name: tensor.clone() for name, tensor in objective.adapted.state_dict().items()}

    assert adapt([0, 1]).keys() == adapt([0, 1]).keys()
    assert adapt([0, 1]).keys().isdisjoint(adapt([0, 2]).keys())


def test_aligned_teachers_say_what_the_student_says(patterns: Patterns) -> None:
    images, _ = patterns
    student = fedkd.network("cnn_tiny", images, seed=1)
    fit(student, images, epochs=10, seed=0)
    teacher = fedkd.network("cnn_small", images, seed=2)
    wanted = predict(student, images.images)

    def alike() -> float:
        return float(agreement([predict(teacher, images.images), wanted])[0, 1])

    before = alike()
    align(teacher, student, images.images, epochs=15, seed=0)
    assert alike() > max(0.9, before)
