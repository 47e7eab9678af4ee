"""VGG with batch norm and a single linear head, in the shapes of the CRD and mdistiller benchmarks.

References:
    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", ICLR 2015, https://arxiv.org/abs/1409.1556
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from fedkd.models.staged import StagedClassifier, initialise, register

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _vgg(
    num_classes: int, in_channels: int, image_size: int, *, convolutions: Sequence[int]
) -> nn.Module:
    # The published nets pool three times on 32x32 and a fourth time only from 64x64 on.
    pools = 4 if image_size >= 64 else 3
    stages: list[nn.Module] = []
    inputs = in_channels
    for number, (count, width) in enumerate(zip(convolutions, _WIDTHS)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if 0 < number <= pools else []
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        stages.append(nn.Sequential(*layers))
    return initialise(StagedClassifier(stages, _WIDTHS[-1], num_classes), linear_std=0.01)


for _depth, _counts in _CONVOLUTIONS.items():
    register(
        f"vgg{_depth}",
        f"VGG-{_depth} with batch norm, {sum(_counts)} convolutions and one linear layer.",
        partial(_vgg, convolutions=_counts),
    )
