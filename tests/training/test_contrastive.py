"""SimCLR on the transfer set: the published loss, and features that got better."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import fedkd
from fedkd.config import Optimizer
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Pooled
from fedkd.models.network import Network
from fedkd.runs.directory import network_hash
from fedkd.training.contrastive import contrastive_loss, pretrain


def test_the_loss_of_two_images_by_hand() -> None:
    """Views that agree and images at right angles: log(e^2 + 1 + 1) - 2 at temperature 1/2."""
    views = torch.eye(2)
    assert float(contrastive_loss(views, views)) == pytest.approx(math.log(math.e**2 + 2) - 2)
    swapped = float(contrastive_loss(views, views.flip(0)))
    assert swapped == pytest.approx(math.log(math.e**2 + 2))


def test_the_loss_is_symmetric_and_blind_to_lengths() -> None:
    first, second = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    loss = contrastive_loss(first, second)
    assert torch.allclose(loss, contrastive_loss(second, first))
    assert torch.allclose(loss, contrastive_loss(3 * first, 0.1 * second), atol=1e-6)


def _probe(network: Network, images: fedkd.ImageSet) -> float:
    """Accuracy of a linear classifier on frozen features, trained on half of the images."""
    assert images.labels is not None
    features = extract(network, images.images, (Pooled(),))[Pooled()].numpy()
    half = len(features) // 2
    labels = images.labels.numpy()
    probe = LogisticRegression(max_iter=500).fit(features[:half], labels[:half])
    return float(probe.score(features[half:], labels[half:]))


def test_features_of_digits_get_better_without_a_label() -> None:
    train, _ = fedkd.load_dataset("digits")
    some = train.subset(torch.arange(400))
    network = fedkd.network("cnn_small", some)
    before = _probe(network, some)
    options = Optimizer(name="adamw", lr=0.003)
    losses = pretrain(
        network, some.images, epochs=10, batch_size=64, augment="crop", optimizer=options, seed=1
    )
    assert losses[-1] < losses[0] - 0.5
    assert _probe(network, some) > before + 0.1


def test_the_same_seed_gives_the_same_network_and_its_classifier_stays() -> None:
    images, _ = fedkd.load_dataset("synthetic", classes=3, size=8, per_class=10)
    hashes = set()
    for _ in range(2):
        network = fedkd.network("cnn_tiny", images)
        assert network.head is not None
        head = network.head.weight.detach().clone()
        pretrain(network, images.images, epochs=1, batch_size=8, seed=2)
        hashes.add(network_hash(network))
        decayed = 1 - network.head.weight.detach() / head
        assert float(decayed.abs().max()) < 1e-3
    assert len(hashes) == 1
