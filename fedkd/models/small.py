"""Small convolutional networks and a perceptron for 8x8 and 28x28 images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from fedkd.models import MODELS
from fedkd.models.staged import StagedClassifier, group_norm

Norm = Literal["none", "batch", "group"]
"""`group` and `none` never mix the samples of a batch, as DP-SGD requires."""


def _norm(norm: Norm, channels: int) -> list[nn.Module]:
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if norm == "group":
        return [group_norm(channels)]
    return []


def _cnn(num_classes: int, in_channels: int, widths: Sequence[int], norm: Norm) -> nn.Module:
    """3x3 convolutions with ReLU, a 2x2 max pooling before each but the first."""
    stages, inputs = [], in_channels
    for number, width in enumerate(widths):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        layers += [nn.Conv2d(inputs, width, 3, padding=1), *_norm(norm, width), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
        inputs = width
    return StagedClassifier(stages, inputs, num_classes)


@MODELS.register("cnn_tiny")
def cnn_tiny(
    num_classes: int, in_channels: int, image_size: int, *, width: int = 16, norm: Norm = "none"
) -> nn.Module:
    """Two convolutions, about 4,000 parameters.

    Args:
        width: Channels of the first convolution; the second has 1.5 times as many.
        norm: What normalises the features between convolution and ReLU.
    """
    return _cnn(num_classes, in_channels, (width, 3 * width // 2), norm)


@MODELS.register("cnn_small")
def cnn_small(
    num_classes: int, in_channels: int, image_size: int, *, width: int = 16, norm: Norm = "none"
) -> nn.Module:
    """Three convolutions, about 20,000 parameters.

    Args:
        width: Channels of the first convolution; the others have two and three times as many.
        norm: What normalises the features between convolution and ReLU.
    """
    return _cnn(num_classes, in_channels, (width, 2 * width, 3 * width), norm)


class Perceptron(nn.Module):
    """Fully connected layers with ReLU; has no stage features."""

    stages: tuple[str, ...] = ()
    head_name = "head"

    def __init__(self, inputs: int, hidden: int, layers: int, num_classes: int) -> None:
        super().__init__()
        widths = (inputs, *[hidden] * layers)
        steps = [step for pair in pairwise(widths) for step in (nn.Linear(*pair), nn.ReLU())]
        self.trunk = nn.Sequential(nn.Flatten(), *steps)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, h, w)."""
        logits: Tensor = self.head(self.trunk(images))
        return logits


@MODELS.register("mlp")
def mlp(
    num_classes: int, in_channels: int, image_size: int, *, hidden: int = 64, layers: int = 2
) -> nn.Module:
    """Multi-layer perceptron on the flattened image.

    Args:
        hidden: Width of each hidden layer.
        layers: Number of hidden layers; 0 makes it a linear classifier.
    """
    return Perceptron(in_channels * image_size**2, hidden, layers, num_classes)
