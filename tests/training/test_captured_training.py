"""Training by captured steps is training step by step.

On a CPU `graphs="on"` goes the way of a capture without a graph: static batches, weights of terms
in tensors, numbers fetched afterwards. There the results are the same bit by bit.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedkd
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import BatchSource, OnlineBatches, TransferBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import EpochRecord, distill
from fedkd.knowledge.extract import extract
from fedkd.knowledge.payload import Bank, Knowledge, Teacher, fuse
from fedkd.models.network import Network
from fedkd.training.graph import WARM
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import Regulariser, align, fit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of 30 images there are odd batches of 6; some captures see their first replay in a later epoch.
BATCH, EPOCHS = 8, 6
ADAM = Optimizer(schedule="cosine", warmup=0.2)
SGD = Optimizer(name="sgd", lr=0.01, schedule="step", nesterov=True, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return fedkd.load_dataset("synthetic", classes=3, size=8, per_class=10)[0]


def _network(images: ImageSet, seed: int = 0, **options: Any) -> Network:
    network = fedkd.network("cnn_tiny", images, seed=seed, norm="batch", **options)
    return network.to(DEVICE).eval()


def _objective(*names: str) -> Objective:
    """Terms that begin, end and fade while captures exist."""
    times: list[dict[str, Any]] = [{"warmup": 2, "decay_from": 3}, {"start": 2, "stop": 4}, {}]
    terms = [
        Term(name, fedkd.LOSSES.create(name), weight=0.5, **times[number % 3])
        for number, name in enumerate(names)
    ]
    return Objective([Term("always", fedkd.LOSSES.create("ce"), weight=0.25), *terms])


def _online(images: ImageSet, objective: Objective) -> BatchSource:
    teachers = [_network(images, seed) for seed in (1, 2)]
    return OnlineBatches(
        images, teachers, objective.needs, augment="crop_flip", virtual="randaugment",
        batch_size=BATCH, device=DEVICE,
    )  # fmt: skip


def _shared(images: ImageSet, objective: Objective) -> BatchSource:
    def views(_number: int) -> torch.Tensor:
        return images.images.flip(3)

    knowledge = [
        Knowledge(
            Teacher(number),
            extract(_network(images, number), images.images, objective.needs, views=views),
        )
        for number in (1, 2)
    ]
    fused = fuse(Bank.of(knowledge), [])
    return TransferBatches(images.images, fused, views=views, batch_size=BATCH, device=DEVICE)


Source = Callable[[ImageSet, Objective], BatchSource]


def _distilled(
    images: ImageSet, source: Source, losses: tuple[str, ...], graphs: Any, **options: Any
) -> tuple[list[EpochRecord], dict[str, torch.Tensor]]:
    objective = _objective(*losses)
    student = _network(images, 9)
    history, _ = distill(
        student, source(images, objective), objective, epochs=EPOCHS, seed=3, graphs=graphs,
        **options,
    )  # fmt: skip
    return history, student.state_dict()


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    exact = {"rtol": 0, "atol": 0} if DEVICE.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **exact)


@pytest.mark.parametrize(
    ("source", "losses", "options"),
    [
        (_online, ("dkd", "vrm"), {"optimizer": SGD}),
        (_online, ("kd", "fitnet"), {"optimizer": ADAM, "precision": "bfloat16"}),
        (_shared, ("dkd", "vrm", "rkd"), {"optimizer": ADAM}),
        (_shared, ("aekd", "dist", "wkd_f"), {"optimizer": SGD}),
    ],
    ids=["online", "online-bfloat16", "shared", "shared-solvers"],
)
def test_a_student_is_the_same(
    images: ImageSet, source: Source, losses: tuple[str, ...], options: dict[str, Any]
) -> None:
    eager = _distilled(images, source, losses, "off", **options)
    captured = _distilled(images, source, losses, "on", **options)
    _same(captured[1], eager[1])
    for ours, theirs in zip(captured[0], eager[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.terms == pytest.approx(theirs.terms, rel=1e-6)
        assert ours.gradients == pytest.approx(theirs.gradients, rel=1e-4)
        assert (ours.epoch, ours.lr) == (theirs.epoch, theirs.lr)


@pytest.mark.parametrize("pulled", [False, True])
def test_a_teacher_is_the_same(images: ImageSet, pulled: bool) -> None:
    results = []
    for graphs in ("off", "on"):
        teacher = _network(images)
        pull = Regulariser(_network(images, 4)) if pulled else None
        fitted = fit(
            teacher, images, epochs=EPOCHS, batch_size=BATCH, optimizer=ADAM, augment="randaugment",
            label_smoothing=0.1, seed=1, pull=pull, graphs=graphs,
        )  # fmt: skip
        align(teacher, _network(images, 4), images.images, batch_size=4, seed=2, graphs=graphs)
        results.append((fitted, teacher.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0])
    _same(results[1][1], results[0][1])


def test_an_interrupted_training_goes_on_with_other_captures(images: ImageSet) -> None:
    straight = _distilled(images, _online, ("dkd",), "on", optimizer=ADAM)[1]
    kept: dict[str, Any] = {}

    def on_epoch(record: EpochRecord, snapshot: Callable[[], dict[str, Any]]) -> None:
        if record.epoch == 4:
            kept.update(snapshot())

    _distilled(images, _online, ("dkd",), "on", optimizer=ADAM, on_epoch=on_epoch)
    assert isinstance(kept["optimizer"]["param_groups"][0]["lr"], float)
    _same(_distilled(images, _online, ("dkd",), "on", optimizer=ADAM, resume=kept)[1], straight)


def test_a_loss_that_learns_between_the_steps_is_taken_step_by_step(
    images: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        captured = _distilled(images, _shared, ("mmkd",), "on")
    assert [r.getMessage() for r in caplog.records if "without a graph" in r.getMessage()] == [
        "the student's training step runs without a graph, operation by operation: "
        "loss 'mmkd' learns between the steps"
    ]
    _same(captured[1], _distilled(images, _shared, ("mmkd",), "off")[1])


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_loss_that_is_not_finite_is_named(images: ImageSet, graphs: Any) -> None:
    broken = Optimizer(name="sgd", lr=1e30)
    with pytest.raises(RuntimeError, match=r"the student's loss is (nan|inf) in epoch 1"):
        _distilled(images, _online, ("kd",), graphs, optimizer=broken)


def test_answers_that_do_not_fit_are_read_batch_by_batch(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _distilled(images, _shared, ("dkd", "vrm"), "off")[1]
    monkeypatch.setattr("fedkd.distillation.batches.resident", lambda _device: 0)
    with caplog.at_level(logging.WARNING):
        _same(_distilled(images, _shared, ("dkd", "vrm"), "on")[1], whole)
    assert "the teachers' answers do not fit there" in caplog.text


def test_captures_are_used(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of both sizes are replayed, but for the first ones and those whose gradient is seen."""
    taken: list[tuple[int, ...]] = []

    def replay(self: Any, values: Any) -> Any:
        taken.append(tuple(values[0].shape))
        return plain(self, values)

    from fedkd.training.graph import _Replay

    plain = _Replay.__call__
    monkeypatch.setattr(_Replay, "__call__", replay)
    _distilled(images, _online, (), "on")
    assert taken.count((6,)) == EPOCHS - WARM
    assert taken.count((8,)) == 3 * EPOCHS - WARM
