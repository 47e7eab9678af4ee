"""Residual networks for small images, in the shapes of the CRD and mdistiller benchmarks.

References:
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
    https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models.staged import StagedClassifier, conv_bn, initialise, register


class Residual(nn.Module):
    """ReLU(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        return F.relu(self.branch(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return conv_bn(inputs, outputs, 1, stride=stride)


def basic_block(inputs: int, outputs: int, stride: int) -> Residual:
    """Two 3x3 convolutions."""
    branch = nn.Sequential(
        conv_bn(inputs, outputs, stride=stride), nn.ReLU(), conv_bn(outputs, outputs)
    )
    return Residual(branch, _shortcut(inputs, outputs, stride))


def bottleneck_block(inputs: int, outputs: int, stride: int) -> Residual:
    """1x1, 3x3, 1x1 convolutions; the inner width is a quarter of the output's."""
    inner = outputs // 4
    branch = nn.Sequential(
        conv_bn(inputs, inner, 1),
        nn.ReLU(),
        conv_bn(inner, inner, stride=stride),
        nn.ReLU(),
        conv_bn(inner, outputs, 1),
    )
    return Residual(branch, _shortcut(inputs, outputs, stride))


def _resnet(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    widths: Sequence[int],
    blocks: Sequence[int],
    block: Callable[[int, int, int], nn.Module] = basic_block,
) -> nn.Module:
    """`widths` are those of the stem and of each stage; `blocks` are counted per stage."""
    stages: list[nn.Module] = [nn.Sequential(conv_bn(in_channels, widths[0]), nn.ReLU())]
    for number, count in enumerate(blocks):
        inputs, outputs = widths[number], widths[number + 1]
        first = block(inputs, outputs, 1 if number == 0 else 2)
        rest = (block(outputs, outputs, 1) for _ in range(count - 1))
        stages.append(nn.Sequential(first, *rest))
    return initialise(StagedClassifier(stages, widths[-1], num_classes))


def _basic(
    num_classes: int, in_channels: int, image_size: int, *, width: int, depth: int
) -> nn.Module:
    """The paper's networks for CIFAR: `width` channels, then twice and four times as many."""
    return _resnet(
        num_classes,
        in_channels,
        image_size,
        widths=(width, width, 2 * width, 4 * width),
        blocks=((depth - 2) // 6,) * 3,
    )


for _depth in (8, 14, 20, 32, 44, 56, 110):
    register(
        f"resnet{_depth}",
        f"CIFAR ResNet-{_depth}: basic blocks, 16, 32 and 64 channels.",
        partial(_basic, depth=_depth),
        width=16,
    )

for _depth in (8, 32):
    register(
        f"resnet{_depth}x4",
        f"CIFAR ResNet-{_depth}, four times as wide: 64, 128 and 256 channels.",
        partial(_resnet, widths=(32, 64, 128, 256), blocks=((_depth - 2) // 6,) * 3),
    )

register(
    "resnet50",
    "ResNet-50 with a 3x3 stem for small images: bottleneck blocks, 256 to 2048 channels.",
    partial(
        _resnet, widths=(64, 256, 512, 1024, 2048), blocks=(3, 4, 6, 3), block=bottleneck_block
    ),
)
