"""What holds for every training: options act, batches of one count, nothing is NaN in silence."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.config import make_experiment
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import OnlineBatches, TransferBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import STUDENT, Precision, distill
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Knowledge, Teacher, fuse
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import Mechanism, fit_private
from fedkd.rounds import ExperimentContext, experiment_context
from fedkd.runs.directory import network_hash
from fedkd.simulations.baselines.fd import pull_towards
from fedkd.simulations.baselines.loop import distill_client, distill_server, train
from fedkd.studies.audit.training import proxy
from fedkd.training.batches import Order, batches, steps_per_epoch
from fedkd.training.loop import CHECK_EVERY, Trainer
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import Regulariser, align, fit

CLASSES, SIDE = 3, 8


@cache
def _images() -> ImageSet:
    train, _ = fedkd.load_dataset("synthetic", classes=CLASSES, size=SIDE, per_class=4)
    return train.subset(torch.arange(8))


def _logits(count: int) -> Tensor:
    return torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def _network(model: str | nn.Module = "mlp", seed: int = 0) -> Network:
    return fedkd.network(model, _images(), seed=seed)


PLAIN = Optimizer(name="sgd", lr=0.1)
STEPPED = Optimizer(name="sgd", lr=0.1, schedule="step")


@dataclass(frozen=True)
class Setting:
    """How a loop is run."""

    optimizer: Optimizer = PLAIN
    batch_size: int = 3
    epochs: int = 2
    samples: int = 8

    @property
    def images(self) -> ImageSet:
        return _images().subset(torch.arange(self.samples))

    @property
    def options(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "batch_size": self.batch_size, "optimizer": self.optimizer}

    def context(self) -> ExperimentContext:
        given = {k: v for k, v in asdict(self.optimizer).items() if v is not None}
        recipe = {"epochs": self.epochs, "batch_size": self.batch_size, "optimizer": given}
        dataset = {"name": "synthetic", "classes": CLASSES, "size": SIDE, "per_class": 8}
        sizes = {"transfer": {"size": self.samples}, "private": self.samples, "holdout": 0}
        values = {
            "clients": 1,
            "rounds": 1,
            "data": {"dataset": dataset, "partition": "iid", **sizes},
            "teachers": {**recipe, "models": ["mlp"]},
            "student": {"model": "mlp"},
            "distillation": {**recipe, "losses": ["kd"]},
        }
        return experiment_context(make_experiment(values))


Loop = Callable[[Network, Setting], object]


def _shared(network: Network, setting: Setting, *losses: str | DistillationLoss) -> object:
    fused = Fused.of(Teacher(0), _logits(setting.samples))
    batches = TransferBatches(setting.images.images, fused, batch_size=setting.batch_size)
    return _distil(network, batches, setting, *losses)


def _live(network: Network, setting: Setting, *losses: str | DistillationLoss) -> object:
    teacher = _network(seed=5).eval()
    batches = OnlineBatches(setting.images, [teacher], (Logits(),), batch_size=setting.batch_size)
    return _distil(network, batches, setting, *losses)


def _distil(
    network: Network,
    batches: TransferBatches | OnlineBatches,
    setting: Setting,
    *losses: str | DistillationLoss,
    precision: Precision = "float32",
) -> object:
    made = [fedkd.LOSSES.create(item) if isinstance(item, str) else item for item in losses]
    terms = [Term(f"loss {n}", loss) for n, loss in enumerate(made or [fedkd.LOSSES.create("kd")])]
    return distill(
        network, batches, Objective(terms), epochs=setting.epochs, optimizer=setting.optimizer,
        precision=precision,
    )  # fmt: skip


def _private(network: Network, setting: Setting) -> None:
    mechanism = Mechanism.of(setting.samples, setting.batch_size, setting.epochs, 0.1)
    options = {"optimizer": setting.optimizer, "seed": 1, "noise_seed": 2}
    fit_private(network, setting.images, mechanism, **options)


def _fit(network: Network, setting: Setting, pull: Any = None) -> object:
    return fit(network, setting.images, **setting.options, seed=1, pull=pull)


def _align(network: Network, setting: Setting) -> None:
    align(network, _network(seed=5), setting.images.images, **setting.options, seed=1)


def _towards(network: Network, setting: Setting) -> object:
    return _fit(network, setting, pull_towards(_logits(CLASSES), torch.arange(CLASSES) < 2, 1.0))


LOOPS: dict[str, Loop] = {
    "fit": _fit,
    "regularised": lambda net, setting: _fit(net, setting, Regulariser(_network(seed=5))),
    "align": _align,
    "towards": _towards,
    "digest": lambda net, setting: distill_client(
        setting.context(), net, 0, 1, _logits(setting.samples), epochs=None
    ),
    "distill_server": lambda net, setting: distill_server(
        setting.context(), net, _logits(setting.samples), 1
    ),
    "train": lambda net, setting: train(setting.context(), {0: net}, 1),
    "shared": _shared,
    "live": _live,
}
ALL: dict[str, Loop] = {**LOOPS, "private": _private}

CHANGES: dict[str, tuple[Optimizer, dict[str, object]]] = {
    "name": (PLAIN, {"name": "adam"}),
    "lr": (PLAIN, {"lr": 0.05}),
    "momentum": (PLAIN, {"momentum": 0.0}),
    "weight_decay": (PLAIN, {"weight_decay": 0.1}),
    "nesterov": (PLAIN, {"nesterov": True}),
    "schedule": (PLAIN, {"schedule": "constant"}),
    "milestones": (STEPPED, {"milestones": (0.1,)}),
    "gamma": (STEPPED, {"gamma": 0.5}),
    "warmup": (PLAIN, {"warmup": 0.5}),
    "max_grad_norm": (PLAIN, {"max_grad_norm": 0.001}),
}


@cache
def _trained(loop: str, setting: Setting) -> str:
    network = _network()
    ALL[loop](network, setting)
    assert not network.training
    return network_hash(network)


def test_every_key_of_the_optimizer_is_tried() -> None:
    assert CHANGES.keys() == {f.name for f in fields(Optimizer)}


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("loop", ALL)
def test_every_key_of_the_optimizer_acts_in_every_loop(loop: str, key: str) -> None:
    before, change = CHANGES[key]
    after = replace(before, **change)
    setting = Setting(before)
    if (loop, key) == ("private", "max_grad_norm"):
        with pytest.raises(ValueError, match="max_grad_norm clips the gradient of a batch"):
            _trained(loop, replace(setting, optimizer=after))
        return
    assert _trained(loop, setting) != _trained(loop, replace(setting, optimizer=after))


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_of_the_optimizer_acts_on_the_audits_proxy(key: str) -> None:
    before, change = CHANGES[key]
    hashes = {
        network_hash(proxy(Setting(options).context(), _logits(8)))
        for options in (before, replace(before, **change))
    }
    assert len(hashes) == 2


@pytest.mark.parametrize("loop", ALL)
def test_batches_of_one_train(loop: str) -> None:
    """Another order of the same samples gives another network: single steps were taken."""
    start = network_hash(_network())
    one = _trained(loop, Setting(batch_size=1))
    assert one not in (start, _trained(loop, Setting(batch_size=8)))


@pytest.mark.parametrize("loop", LOOPS)
def test_batches_of_one_and_batch_norm_are_refused_by_the_key(loop: str) -> None:
    network = fedkd.network("cnn_tiny", _images(), norm="batch")
    with pytest.raises(ValueError, match=r"batch_size.*(batch norm \(body\.|at least 2)") as error:
        LOOPS[loop](network, Setting(batch_size=1))
    assert "\n" not in str(error.value)
    LOOPS[loop](network, Setting(batch_size=2))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_single_image_is_learnt(loop: str, norm: str) -> None:
    network = fedkd.network("cnn_tiny", _images(), norm=norm)
    start = network_hash(network)
    LOOPS[loop](network, Setting(samples=1, batch_size=4))
    assert network_hash(network) != start


@pytest.mark.parametrize("name", ["rkd", "sp", "relation", "cka"])
def test_losses_that_compare_images_refuse_single_ones(name: str) -> None:
    for setting, key in (
        (Setting(batch_size=1), "batch_size: is 1"),
        (Setting(samples=1), "images: there is only one"),
    ):
        with pytest.raises(ValueError, match=f"{key}, but loss '{name}' learns from the images of"):
            fedkd.train_student(
                "cnn_tiny", [fedkd.network("cnn_tiny", _images(), width=4)],
                setting.images.unlabelled(), losses=["kd", name],
                batch_size=setting.batch_size,
            )  # fmt: skip


@pytest.mark.parametrize("name", ["fitnet", "wkd_f"])
def test_losses_that_bring_batch_norm_refuse_batches_of_one(name: str) -> None:
    teacher = fedkd.network("cnn_tiny", _images())
    with pytest.raises(ValueError, match=f"batch_size: loss '{name}' brings a layer with batch"):
        fedkd.train_student("cnn_tiny", [teacher], _images(), losses=[name], batch_size=1)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_left_over_batch_of_one_is_dropped_and_not_counted(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 samples in threes, two steps per epoch; a schedule over more would end higher."""
    step = Mock(side_effect=torch.optim.SGD.step)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args, **more: step(*args, **more))
    LOOPS[loop](_network(), Setting(samples=7))
    assert step.call_count == 2 * steps_per_epoch(7, 3) == 4


def test_batches_are_as_many_as_are_counted_and_drop_one_at_most() -> None:
    for total, batch_size in itertools.product(range(1, 12), range(1, 13)):
        parts = list(batches(torch.arange(total), batch_size))
        dropped = total - sum(map(len, parts))
        assert len(parts) == steps_per_epoch(total, batch_size) >= 1
        assert dropped == (1 < batch_size < total and total % batch_size == 1)


def test_an_order_can_begin_at_any_epoch() -> None:
    straight, back = Order(9, 3), Order(9, 3)
    orders = [straight.epoch(number).tolist() for number in (1, 2, 3)]
    assert [back.epoch(number).tolist() for number in (3, 1, 2, 3)] == [orders[2], *orders]
    assert len({tuple(order) for order in orders}) == 3


class _Trap(nn.Module):
    """Adds nothing, but its gradient is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return images + (self.scale * 0).sqrt()


def _trapped() -> Network:
    size = SIDE * SIDE
    body = nn.Sequential(
        nn.Flatten(), _Trap(), nn.Linear(size, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )
    return fedkd.network(body, _images())


@pytest.mark.smoke
@pytest.mark.parametrize("loop", LOOPS)
def test_a_gradient_that_is_not_finite_ends_the_training(loop: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"gradient of the \w+.*'s loss is nan in epoch 1.*lower"
    ):
        LOOPS[loop](_trapped(), Setting())


class _Flat(DistillationLoss):
    """Zero, with a gradient of its choice."""

    needs = (Logits(),)

    def __init__(self, *, root: bool) -> None:
        super().__init__()
        self.root = root

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: TeacherWeights
    ) -> Tensor:
        zero = student[Logits()].sum(dim=1) * 0
        return zero.sqrt() if self.root else zero


@pytest.mark.parametrize("distil", [_shared, _live])
def test_the_loss_whose_gradient_is_not_finite_is_named(distil: Callable[..., object]) -> None:
    student = _network()
    with pytest.raises(RuntimeError, match=r"loss 1 0\), because of 'loss 1'; lower"):
        distil(student, Setting(), "kd", _Flat(root=True))
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("loop", LOOPS)
def test_where_numbers_are_fetched_seldom_the_first_bad_step_is_found(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: the losses after a bad gradient are consequences of it."""
    start = _trained(loop, Setting())
    monkeypatch.setitem(CHECK_EVERY, "cpu", 50)
    _trained.cache_clear()
    assert _trained(loop, Setting()) == start
    with pytest.raises(RuntimeError, match=r"gradient of the .*'s loss is nan in epoch 1, though"):
        LOOPS[loop](_trapped(), Setting())


def test_a_teacher_that_spoils_a_later_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECK_EVERY, "cpu", 50)
    logits = _logits(8)
    fused = Fused.of(Teacher(4), logits)
    batches = TransferBatches(_images().images, fused, batch_size=2)
    bad = int(list(Order(8, 0).epoch(1))[5])  # in the third of four batches
    assert batches._answers is not None
    batches._answers.logits[0, bad, 1] = torch.nan
    monkeypatch.setattr(TransferBatches, "example", lambda self: self.batch(torch.arange(0), 0, 0))
    with pytest.raises(RuntimeError, match="teacher 4 gives nan as logits for image"):
        _distil(_network(), batches, Setting())


def test_in_float16_a_training_without_a_step_is_an_error() -> None:
    batches = TransferBatches(_images().images, Fused.of(Teacher(0), _logits(8)), batch_size=3)
    with pytest.raises(RuntimeError, match="not trained: in float16 the gradient of none of 6"):
        _distil(_network(), batches, Setting(), _Flat(root=True), precision="float16")
    setting = Setting(epochs=10)
    with pytest.raises(RuntimeError, match="however little it is scaled for float16"):
        _distil(_network(), batches, setting, _Flat(root=True), precision="float16")


def test_a_loss_without_any_gradient_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _shared(_network(), Setting(), _Flat(root=False))
    assert (
        "the student has learnt nothing: its loss had no gradient in any of 6 steps" in caplog.text
    )


@pytest.mark.parametrize("loop", ALL)
def test_weights_that_are_not_finite_to_begin_with_are_named(loop: str) -> None:
    network = _network()
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"weights are not finite before its training \(body\."):
        ALL[loop](network, Setting())


@pytest.mark.parametrize("loop", LOOPS)
def test_weights_that_are_not_finite_in_the_end_are_an_error(loop: str) -> None:
    """The last step of an epoch overflows: no loss is computed after it."""
    setting = Setting(Optimizer(name="sgd", lr=1e38, weight_decay=1e3), 8, epochs=1)
    with pytest.raises(RuntimeError, match=r"weights are not finite after epoch 1 \(body\..*lower"):
        LOOPS[loop](_network(), setting)


@pytest.mark.parametrize("loop", ALL)
def test_a_frozen_network_is_refused(loop: str) -> None:
    network = _network().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weights to train|no parameter is trainable"):
        ALL[loop](network, Setting())


@pytest.mark.parametrize("loop", ["fit", "regularised", "towards"])
def test_an_empty_shard_is_refused(loop: str) -> None:
    with pytest.raises(ValueError, match="the teacher has no images to learn from"):
        LOOPS[loop](_network(), Setting(samples=0))


def test_no_epoch_or_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs: expected a whole number of at least 1, got 0"):
        _shared(_network(), Setting(epochs=0))
    batches = TransferBatches(_images().images, Fused.of(Teacher(0), _logits(8)))
    nothing = Objective([Term("kd", fedkd.LOSSES.create("kd"), weight=0.0)])
    with pytest.raises(ValueError, match="every loss has weight 0"):
        distill(_network(), batches, nothing)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="batch_size: expected at least 1"):
            TransferBatches(_images().images, Fused.of(Teacher(0), _logits(8)), batch_size=wrong)


def test_a_student_that_is_not_finite_is_blamed_and_not_the_teachers_learning_rate() -> None:
    student, images = _network(seed=5), _images()
    with torch.no_grad():
        next(student.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(RuntimeError, match="student's predictions are not finite"):
        align(_network(), student, images.images, seed=1)
    with pytest.raises(RuntimeError, match="student that regularises are not finite"):
        fit(_network(), images, seed=1, pull=Regulariser(student))


@pytest.mark.parametrize("optimizer", [PLAIN, Optimizer(max_grad_norm=1.0)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("losses", [["ce", "dkd", "vrm"], ["kd", "sp", "fitnet"]], ids="-".join)
def test_no_step_fetches_a_number_from_the_device(
    losses: list[str], optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device `meta`, where tensors have no values, a look at one is an error."""
    images, student = _images().images, _network("cnn_tiny")
    objective = Objective([Term(name, fedkd.LOSSES.create(name)) for name in losses])
    views = {number: images.flip(3) for number in range(2)}
    teacher = extract(_network("cnn_tiny", seed=1), images, objective.needs, views=views.get)
    fused = fuse(Bank.of([Knowledge(Teacher(0), teacher)]), [])
    batches = TransferBatches(images, fused, views=views.get, batch_size=4, device="meta")
    example = TransferBatches(images, fused, views=views.get, batch_size=4).example()
    objective.adapt(example.read(student, objective.reads), example.ensemble, seed=0)
    monkeypatch.setattr("fedkd.training.loop.check_finite", lambda *_: None)
    more = objective.to("meta").parameters()
    trainer = Trainer(student.to("meta").train(), optimizer, STUDENT, 2, more=more)
    for batch in batches.epoch(1):
        readings = batch.read(student, objective.reads_in(1))
        value = objective(readings, batch.ensemble, batch.targets, 1, 1)
        norm = trainer.backward(value.total)
        trainer.update()
        with pytest.raises((RuntimeError, NotImplementedError)):
            norm.item()
    assert trainer.steps == 2
