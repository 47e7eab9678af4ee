"""DP-SGD of many clients together is DP-SGD of each alone, noise included."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkd.models import MODELS
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import Mechanism, fit_private, fit_private_many
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import Regulariser
from tests.privacy.test_dp_sgd import CLASSES, flat, images

SIZES = (12, 0, 7, 1)
SEEDS = [3, 4, 5, 6]
STEPS = Mechanism(
    sample_rate=0.4, expected_batch_size=4.0, steps=3, noise_multiplier=0.5, physical_batch=3
)
SGD = Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.001)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(0.3), nn.GroupNorm(2, 4))
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.features(images).relu().mean((2, 3))))


def teachers(make: Callable[[], nn.Module]) -> list[Network]:
    found = []
    for seed in range(len(SIZES)):
        torch.manual_seed(seed)
        found.append(Network(make(), mean=[0.5], std=[0.25]).double())
    return found


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: MODELS.create(name, len(CLASSES), 1, 8, **options)


def compared(
    make: Callable[[], nn.Module],
    mechanism: Mechanism = STEPS,
    regulariser: Regulariser | None = None,
    **options: Any,
) -> None:
    alone, shards = teachers(make), [images(size) for size in SIZES]
    start, together = [flat(each) for each in alone], copy.deepcopy(alone)
    errors = fit_private_many(
        together, shards, mechanism, seeds=SEEDS, noise_seeds=SEEDS, together=True,
        regularisers=[regulariser] * len(SIZES), **{"optimizer": SGD, **options},
    )  # fmt: skip
    assert errors == [None] * len(SIZES)
    for number, teacher in enumerate(alone):
        fit_private(
            teacher, shards[number], mechanism, seed=SEEDS[number], noise_seed=SEEDS[number],
            regulariser=regulariser, **{"optimizer": SGD, **options},
        )  # fmt: skip
        assert torch.allclose(flat(teacher), flat(together[number]), rtol=1e-9, atol=1e-9)
        assert not torch.equal(flat(teacher), start[number])
        assert not together[number].training


@pytest.fixture(autouse=True)
def stacked(caplog: pytest.LogCaptureFixture) -> Any:
    """No test passes because the stack was given up."""
    caplog.set_level(logging.WARNING)
    yield
    assert "client after client" not in caplog.text


def principal() -> nn.Module:
    body = named("linear", directions=6)()
    body.see(images(20).images, torch.tensor([0.5]), torch.tensor([0.25]))
    return body


@pytest.mark.parametrize(
    "make", [named("mlp"), named("cnn_tiny", norm="group"), principal, Dropping]
)
def test_networks(make: Callable[[], nn.Module]) -> None:
    compared(make)


def test_options() -> None:
    ghost = Mechanism(
        sample_rate=1.0, expected_batch_size=3.0, steps=2, noise_multiplier=0.2,
        max_grad_norm=0.1, clipping="ghost",
    )  # fmt: skip
    adam = Optimizer(name="adam", schedule="step", warmup=0.5)
    compared(named("mlp"), ghost, optimizer=adam, augment="crop_flip", label_smoothing=0.2)


def test_a_regulariser() -> None:
    compared(named("mlp"), regulariser=Regulariser(teachers(named("mlp"))[0], weight=0.5))


def test_an_image_without_a_finite_gradient_does_not_spoil_the_sum() -> None:
    class Brittle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            flat_images = images.flatten(1)
            bad = (flat_images[:, :1] > 0.9) * torch.inf
            return self.head(flat_images) + (bad * 0).nan_to_num(nan=torch.nan)

    mechanism = Mechanism(sample_rate=1.0, expected_batch_size=4.0, steps=2, noise_multiplier=0.1)
    compared(Brittle, mechanism)


def test_errors_are_each_clients_own() -> None:
    several, shards = teachers(named("mlp")), [images(size) for size in SIZES]
    with torch.no_grad():
        next(several[2].parameters()).fill_(torch.nan)
    errors = fit_private_many(several, shards, STEPS, seeds=SEEDS, together=True)
    assert [error is None for error in errors] == [True, True, False, True]
    assert "not finite before its training" in str(errors[2])
    private = fit_private_many(
        teachers(named("cnn_tiny", norm="batch")), shards, STEPS, together=True
    )
    assert all("cannot be trained privately" in str(error) for error in private)
    with pytest.raises(ValueError, match="seeds: expected one for each of 4 teachers, got 1"):
        fit_private_many(several, shards, STEPS, seeds=[1])


def test_secrets_are_drawn_for_each_client() -> None:
    same = [copy.deepcopy(teachers(named("mlp"))[0]) for _ in range(2)]
    assert fit_private_many(same, [images(12)] * 2, STEPS, together=True) == [None, None]
    assert not torch.allclose(flat(same[0]), flat(same[1]), atol=1e-3)
