"""Networks for images of any size."""

from typing import Any

from torch import nn

from fedkd.models.build import build_model
from fedkd.models.network import Network


def built(
    model: str | nn.Module, classes: int = 10, channels: int = 1, size: int = 8, **more: Any
) -> Network:
    """`build_model` for made-up images; `more` are arguments of it."""
    given = {"mean": [0.5] * channels, "std": [0.25] * channels, "seed": 3} | more
    return build_model(model, num_classes=classes, in_channels=channels, image_size=size, **given)
