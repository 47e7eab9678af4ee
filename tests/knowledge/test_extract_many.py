"""Knowledge of many networks read together is that of each read alone."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.data.images import ImageSet
from fedkd.data.views import virtual_view
from fedkd.knowledge.extract import Unreadable, extract, extract_many
from fedkd.knowledge.kinds import (
    ClassMaps,
    DensityRatio,
    FeatureMoments,
    FeatureStatistics,
    Kind,
    Logits,
    Pooled,
    SpectralNorms,
    Stage,
    VirtualLogits,
)
from fedkd.models.network import Network

KINDS = (
    Logits(), VirtualLogits(), VirtualLogits(view=1), Pooled(), Stage(), ClassMaps(),
    FeatureStatistics(), FeatureMoments(), SpectralNorms(),
)  # fmt: skip


@cache
def _images() -> ImageSet:
    train, _ = fedkd.load_dataset("synthetic", classes=3, size=8, per_class=5)
    return train.subset(torch.arange(11))


def _networks(*models: str, **options: object) -> list[Network]:
    return [
        fedkd.network(model, _images(), seed=seed, **options).double()
        for seed, model in enumerate(models)
    ]


@cache
def _views(number: int) -> Tensor:
    return virtual_view(_images().images, seed=0, view=number)


def _compared(networks: list[Network], kinds: tuple[Kind, ...], **options: object) -> None:
    together = extract_many(
        networks, _images().images, kinds, views=_views, batch_size=4, together=True, **options
    )
    for number, network in enumerate(networks):
        own = options["owns"][number] if options else None
        alone = extract(network, _images().images, kinds, views=_views, own=own)
        assert set(alone) == set(together[number]) == set(kinds)
        for kind, tensor in alone.items():
            assert torch.allclose(tensor, together[number][kind], rtol=1e-5, atol=1e-6), kind


def test_every_kind_about_images(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    networks = _networks("resnet8", "resnet8", "resnet8")
    networks[1].train()
    _compared(networks, KINDS)
    assert networks[1].training
    assert not caplog.text


def test_other_kinds_and_other_networks_are_read_alone() -> None:
    private = [_images().images[:3], _images().images[3:], _images().images]
    _compared(_networks("mlp", "cnn_tiny", "mlp"), (DensityRatio(), Logits()), owns=private)
    _compared(_networks("mlp", "mlp", "mlp"), (DensityRatio(),), owns=private)


def test_a_network_that_lacks_a_kind_is_named_as_alone() -> None:
    with pytest.raises(Unreadable) as alone:
        extract(_networks("mlp")[0], _images().images, (Stage(),))
    with pytest.raises(Unreadable) as together:
        extract_many(_networks("mlp", "mlp"), _images().images, (Stage(),), together=True)
    assert str(together.value) == str(alone.value)


def test_numbers_outside_the_weights_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale
            self.head = nn.Linear(64, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.flatten(1) * self.scale)

    networks = [fedkd.network(Scaled(scale), _images()).double() for scale in (1.0, 3.0)]
    _compared(networks, (Logits(),))
    assert "keeps numbers outside its weights" in caplog.text
