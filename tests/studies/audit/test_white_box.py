"""Canaries are seen in noisy steps as strongly as they were in them."""

import copy

import numpy as np
import pytest
import torch

from fedkd.data.images import ImageSet
from fedkd.models import MODELS
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import Mechanism, fit_private
from fedkd.studies.audit import white_box
from fedkd.studies.audit.one_run import audit_scores
from fedkd.studies.audit.white_box import Observer
from fedkd.training.optimizers import Optimizer

PLAIN = Optimizer(name="sgd", lr=0.05, momentum=0.0, weight_decay=0.0, schedule="constant")


def teacher(**options: object) -> Network:
    torch.manual_seed(0)
    return Network(MODELS.create("mlp", 4, 1, 8, **options), mean=[0.5], std=[0.25])


def images(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.randint(4, (count,), generator=generator), tuple("abcd"))


def observed(
    mechanism: Mechanism, canaries: int, *, others: int = 10
) -> tuple[Observer, np.ndarray]:
    """A training on half of the canaries, which are the first images."""
    both = images(canaries + others, 1)
    rest = torch.arange(canaries, len(both))
    planted, shard = both.subset(torch.arange(canaries)), both.subset(rest)
    included = np.random.default_rng(0).random(canaries) < 0.5
    learnt = both.subset(torch.cat([torch.from_numpy(included.nonzero()[0]), rest]))
    network = teacher(hidden=64, layers=1)
    observer = Observer(network, planted, shard, mechanism, 0.0)
    fit_private(network, learnt, mechanism, optimizer=PLAIN, seed=0, watch=observer.step)
    return observer, included


def test_gradients_are_those_of_training() -> None:
    mechanism = Mechanism(1.0, 4.0, 1, 0.0, max_grad_norm=0.1)
    network, shard = teacher(), images(6, 2)
    before = copy.deepcopy(network)
    observer = Observer(network, shard, shard.subset([]), mechanism, 0.1)
    weights = {name: p.detach() for name, p in before.named_parameters()}
    ((_, clipped),) = observer._clipped(weights, shard)
    lr = Optimizer(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    fit_private(network, shard, mechanism, optimizer=lr, label_smoothing=0.1)
    moved = torch.cat(
        [(a - b).detach().flatten() for a, b in zip(before.parameters(), network.parameters())]
    )
    assert torch.allclose(4 * moved, clipped.sum(0), atol=1e-5)


def test_without_much_noise_nearly_all_canaries_are_told_apart() -> None:
    observer, included = observed(Mechanism(1.0, 60.0, 6, 0.05), 60)
    assert audit_scores(observer.scores, included, 1e-5).epsilon > 1


def test_with_the_noise_of_a_small_epsilon_none_is() -> None:
    observer, included = observed(Mechanism(0.5, 30.0, 6, 30.0), 60)
    assert audit_scores(observer.scores, included, 1e-5).epsilon < 0.6


def test_images_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = Mechanism(1.0, 60.0, 2, 1e-3)
    whole, _ = observed(mechanism, 20)
    monkeypatch.setattr(white_box, "_CHUNK", 7 * 5000)
    parts, _ = observed(mechanism, 20)
    assert parts.scores == pytest.approx(whole.scores, rel=1e-2, abs=1e-2)


def test_watching_changes_no_training() -> None:
    mechanism = Mechanism(0.5, 4.0, 3, 1.0)
    plain, watched = teacher(), teacher()
    fit_private(plain, images(8, 3), mechanism, seed=1, noise_seed=2)
    observer = Observer(watched, images(4, 4), images(8, 3), mechanism, 0.0)
    fit_private(watched, images(8, 3), mechanism, seed=1, noise_seed=2, watch=observer.step)
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))
