"""Many teachers trained together are those trained one after the other."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.data.images import ImageSet
from fedkd.data.randaugment import LARGEST, _all_at_once
from fedkd.data.views import AUGMENTATIONS, bordered, crop_flip, draw, drawn, undrawn
from fedkd.models.network import Network
from fedkd.models.stacked import Stack
from fedkd.randomness import stream
from fedkd.training.batched import _Group, _Steps, _until, fit_many, hashed
from fedkd.training.loop import time_limit
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import Fit, Pull, Regulariser, fit

# With batches of 4: one left over and dropped, full batches, a batch of 2, a batch of 3, 1 image.
SIZES = (13, 8, 6, 3, 1, 1)
SEEDS = tuple(range(5, 5 + len(SIZES)))
SGD = Optimizer(name="sgd", lr=0.05)


@cache
def _shards(sizes: tuple[int, ...] = SIZES) -> list[ImageSet]:
    images, _ = fedkd.load_dataset("synthetic", classes=3, size=8, per_class=15)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [images.subset(part) for part in order[: sum(sizes)].split(list(sizes))]


def _teachers(
    model: str | Callable[[], nn.Module] = "mlp", options: dict[str, Any] | None = None
) -> list[Network]:
    return [
        fedkd.network(
            model if isinstance(model, str) else model(), _shards()[0], seed=seed, **(options or {})
        ).double()
        for seed in range(len(SIZES))
    ]


class Dropping(nn.Module):
    """Two kinds of dropout, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(0.3), nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.features(images).relu().mean((2, 3))))


def _compared(
    teachers: Sequence[Network],
    pulls: Sequence[Pull | None] | None = None,
    **options: Any,
) -> list[Fit]:
    """Train together and one by one; the same weights, buffers, losses and accuracies."""
    options = {"epochs": 2, "batch_size": 4, "optimizer": SGD} | options
    together = copy.deepcopy(list(teachers))
    fits = fit_many(together, _shards(), seeds=SEEDS, pulls=pulls, together=True, **options)
    for number, (teacher, shard, seed) in enumerate(zip(teachers, _shards(), SEEDS)):
        pull = None if pulls is None else pulls[number]
        wanted, found = fit(teacher, shard, seed=seed, pull=pull, **options), fits[number]
        assert isinstance(found, Fit), found
        assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert found.accuracy == wanted.accuracy
        assert not together[number].training
        for (name, one), other in zip(
            teacher.state_dict().items(), together[number].state_dict().values(), strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-7, atol=1e-9), (number, name)
    return [each for each in fits if isinstance(each, Fit)]


@pytest.fixture(autouse=True)
def stacked(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Any:
    """No test of stacks passes because they were given up."""
    caplog.set_level(logging.WARNING)
    yield
    if "alone" not in request.node.name:
        assert "client after client" not in caplog.text


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {}),
        ("cnn_tiny", {"norm": "batch"}),
        ("resnet8", {}),
        ("resnet8", {"norm": "group"}),
        ("wrn_16_1", {}),
        ("mixer", {}),
        ("vit_tiny", {}),
    ],
)
def test_architectures(model: str, options: dict[str, Any]) -> None:
    _compared(_teachers(model, options), epochs=1)


@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(
            name="sgd", lr=0.05, nesterov=True, schedule="step", warmup=0.3, max_grad_norm=0.5
        ),
        Optimizer(name="sgd", lr=0.05, momentum=0.0, schedule="constant"),
        Optimizer(name="adam", weight_decay=0.01),
        Optimizer(name="adamw", max_grad_norm=0.1),
    ],
)
def test_optimisers(optimizer: Optimizer) -> None:
    _compared(_teachers(), optimizer=optimizer, label_smoothing=0.1)


@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
def test_augmentation(augment: str) -> None:
    _compared(_teachers(), augment=augment)


def test_dropout_and_batch_norm() -> None:
    _compared(_teachers(Dropping))


def test_a_captured_step() -> None:
    _compared(_teachers(Dropping), graphs="on", epochs=4, augment="crop_flip")


def test_a_part_that_is_frozen() -> None:
    teachers = _teachers("cnn_tiny", {"norm": "batch"})
    for teacher in teachers:
        next(teacher.parameters()).requires_grad_(False)
    _compared(teachers)


def test_stacks_become_smaller_where_that_pays() -> None:
    steps, cpu, gpu = [900, 800, 300, 200], torch.device("cpu"), torch.device("cuda")
    assert [_until(steps, device) for device in (cpu, gpu)] == [200, 200]
    assert [_until([240, 210, 120, 30], device) for device in (cpu, gpu)] == [30, 120]
    assert [_until([90, 80, 30, 20], device) for device in (cpu, gpu)] == [20, 90]
    assert _until([7], gpu) == _until([7, 7, 7], cpu) == 7


def test_half_precision() -> None:
    options = {"epochs": 2, "batch_size": 4, "optimizer": SGD, "together": True}
    plain, half = (
        fit_many(
            [teacher.float() for teacher in _teachers("cnn_tiny", {"norm": "batch"})],
            _shards(),
            seeds=SEEDS,
            autocast=autocast,
            **options,
        )
        for autocast in (None, torch.bfloat16)
    )
    for one, other in zip(plain, half, strict=True):
        assert isinstance(one, Fit)
        assert isinstance(other, Fit)
        assert one.loss != other.loss
        assert one.loss == pytest.approx(other.loss, rel=0.05)


def test_groups_that_need_too_much_memory_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    train, sizes = _Group.train, []

    def limited(self: _Group) -> Any:
        sizes.append(len(self._accounts))
        if len(self._accounts) > 2:
            raise torch.OutOfMemoryError
        return train(self)

    monkeypatch.setattr(_Group, "train", limited)
    _compared(_teachers())
    assert sizes == [4, 2, 2, 2]


def test_steps_are_let_go_as_soon_as_they_are_over() -> None:
    gc.collect()
    gc.disable()
    try:
        _compared(_teachers("cnn_tiny", {"norm": "batch"}), graphs="on")
        assert not [each for each in gc.get_objects() if type(each) is _Steps]
    finally:
        gc.enable()


def _pulled(_images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    return logits[range(len(labels)), labels].square().mean()


def test_regularisers_and_other_pulls() -> None:
    one, other = (
        Regulariser(teacher, weight=weight) for weight, teacher in enumerate(_teachers()[:2], 1)
    )
    _compared(_teachers(), pulls=[one, one, other, None, one, None])
    _compared(_teachers(), pulls=[one] * len(SIZES))
    _compared(_teachers(), pulls=[one, _pulled, _pulled, None, None, _pulled])


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batch_sizes(batch_size: int) -> None:
    _compared(_teachers(), batch_size=batch_size)
    _compared(_teachers("cnn_tiny", {"norm": "batch"}), batch_size=max(batch_size, 2))


class Mixing(nn.Module):
    """Looks at its whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.head(flat - flat.mean(0))


class Choosing(nn.Module):
    """Goes another way for other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.head(flat if flat.sum() > 0 else -flat)


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Mixing, "more than one image of a batch"), (Choosing, "data-dependent")],
)
def test_those_that_cannot_be_stacked_are_trained_alone(
    network: type[nn.Module],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedkd.models.stacked._announced", set())
    _compared(_teachers(network))
    _compared(_teachers(network))
    assert caplog.text.count("is taken client after client") == 1
    assert reason in caplog.text


def test_a_hook_is_kept_alone() -> None:
    together, teachers = _teachers(), _teachers()
    for teacher in (*together, *teachers):
        next(teacher.parameters()).register_hook(lambda gradient: 2 * gradient)
    fits = fit_many(together, _shards(), seeds=SEEDS, epochs=1, together=True)
    wanted = [
        fit(teacher, shard, seed=seed, epochs=1)
        for teacher, shard, seed in zip(teachers, _shards(), SEEDS)
    ]
    assert fits == wanted


def test_on_a_cpu_one_is_trained_after_the_other_unless_asked() -> None:
    options = {"epochs": 2, "batch_size": 4, "augment": "crop"}
    together, alone = _teachers(), _teachers()
    fits = fit_many(together, _shards(), seeds=SEEDS, **options)
    wanted = [
        fit(teacher, shard, seed=seed, **options)
        for teacher, shard, seed in zip(alone, _shards(), SEEDS)
    ]
    assert fits == wanted
    for one, other in zip(together, alone):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("together", [False, True])
def test_a_client_that_fails_does_not_stop_the_others(together: bool) -> None:
    teachers, alone = _teachers(), _teachers()
    with torch.no_grad():
        next(teachers[1].parameters()).fill_(float("nan"))
        # Finite until the first step.
        list(teachers[2].parameters())[-1].fill_(1e200)
        list(alone[2].parameters())[-1].fill_(1e200)
    options = {"epochs": 2, "batch_size": 4, "optimizer": Optimizer(name="sgd", lr=1e150)}
    fits = fit_many(teachers, _shards(), seeds=SEEDS, together=together, **options)
    assert "not finite before its training" in str(fits[1])
    with pytest.raises(RuntimeError) as wanted:
        fit(alone[2], _shards()[2], seed=SEEDS[2], **options)
    assert str(fits[2]) == str(wanted.value)


def test_time_is_over_for_all() -> None:
    with time_limit(0.0):
        fits = fit_many(_teachers(), _shards(), seeds=SEEDS, together=True)
    assert all("longer than its time limit" in str(each) for each in fits)


def test_as_many_shards_as_teachers() -> None:
    with pytest.raises(ValueError, match="shards: expected one for each of 6 teachers, got 2"):
        fit_many(_teachers(), _shards()[:2], seeds=SEEDS)


def test_numbers_of_dropout_on_an_accelerator() -> None:
    keys, time = torch.tensor([3, 4]), torch.tensor([7])
    drawn = hashed((2, 40, 50), keys, time, 0)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(drawn.std()) == pytest.approx(12**-0.5, abs=0.01)
    # A client's are its own, whoever is trained beside it.
    assert torch.equal(hashed((1, 40, 50), keys[1:], time, 0), drawn[1:])
    assert not torch.equal(hashed((2, 40, 50), keys, time + 1, 0), drawn)
    assert not torch.equal(hashed((2, 40, 50), keys, time, 1), drawn)


@pytest.mark.parametrize("recipe", ["none", "flip", "crop", "crop_flip", "randaugment_flip"])
def test_what_is_drawn_before_is_what_the_recipe_does(recipe: str) -> None:
    images, shape = _shards()[0].images, _shards()[0].shape
    (whole,), (real,) = undrawn(1, (len(images),), shape, images.device)
    draw(recipe, shape, stream(0, recipe), whole, real)
    found = drawn(recipe, bordered(images), torch.arange(len(images)), shape, whole, real)
    own = stream(0, recipe)
    if recipe.startswith("randaugment"):  # as accelerators do it
        wanted = _all_at_once(crop_flip(images, own), own, 2, 9 / LARGEST)
    else:
        wanted = AUGMENTATIONS[recipe](images, own)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("model", "method"), [("resnet8", "lora"), ("vit_tiny", "adapter")])
def test_adapters_are_trained_together_beside_one_frozen_part(model: str, method: str) -> None:
    more = {"dropout": 0.2, "r": 2} if method == "lora" else {}
    teachers = _teachers(model, {"peft": {"method": method, **more}})
    name = next(name for name in teachers[0].frozen() if name.endswith("weight"))
    frozen = Stack(teachers, training=True).take(torch.tensor([2, 1])).state[name]
    assert frozen.untyped_storage().nbytes() == 8 * frozen[0].numel()  # there once
    before = [teacher.frozen()[name].clone() for teacher in teachers]
    _compared(teachers)
    assert all(torch.equal(t.frozen()[name], old) for t, old in zip(teachers, before))
