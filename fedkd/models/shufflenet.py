"""ShuffleNet V1 and V2 for small images, in the shapes of the CRD and mdistiller benchmarks.

Both start with a 1x1 stem of 24 channels and no pooling, and keep torch's default init.

References:
    Zhang et al., "ShuffleNet", CVPR 2018, https://arxiv.org/abs/1707.01083
    Ma et al., "ShuffleNet V2", ECCV 2018, https://arxiv.org/abs/1807.11164
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models import MODELS
from fedkd.models.staged import Norm, StagedClassifier, conv_bn, with_norm

_STEM = 24


class Shuffle(nn.Module):
    """Deals the channels of `groups` groups out like cards, (B, C, h, w) -> the same."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Channel k of group g moves to place k * groups + g."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
    """V1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input.

    At stride 2 the branch is appended to the pooled input instead of added to it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        inner = added // 4
        # Too few channels after the stem to be worth grouping (section 3.2 of the paper).
        first = 1 if inputs == _STEM else groups
        self.branch = nn.Sequential(
            conv_bn(inputs, inner, 1, groups=first),
            nn.ReLU(),
            Shuffle(first),
            conv_bn(inner, inner, stride=stride, groups=inner),
            # The paper has no activation here; the benchmarks' networks do.
            nn.ReLU(),
            conv_bn(inner, added, 1, groups=groups),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        out = self.branch(x)
        return F.relu(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))


class SplitUnit(nn.Module):
    """V2 at stride 1: one half passes, the other is convolved, then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1),
            nn.ReLU(),
            conv_bn(half, half, groups=half),
            conv_bn(half, half, 1),
            nn.ReLU(),
        )
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same."""
        passed, convolved = x.chunk(2, 1)
        out: Tensor = self.shuffle(torch.cat([passed, self.branch(convolved)], 1))
        return out


class DownUnit(nn.Module):
    """V2 at stride 2: two convolved branches side by side, shuffled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.short = nn.Sequential(
            conv_bn(inputs, inputs, stride=2, groups=inputs), conv_bn(inputs, half, 1), nn.ReLU()
        )
        self.long = nn.Sequential(
            conv_bn(inputs, half, 1),
            nn.ReLU(),
            conv_bn(half, half, stride=2, groups=half),
            conv_bn(half, half, 1),
            nn.ReLU(),
        )
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / 2, w / 2)."""
        out: Tensor = self.shuffle(torch.cat([self.short(x), self.long(x)], 1))
        return out


def _stem(in_channels: int) -> nn.Module:
    return nn.Sequential(conv_bn(in_channels, _STEM, 1), nn.ReLU())


@MODELS.register("shufflenetv1")
def shufflenetv1(
    num_classes: int, in_channels: int, image_size: int, *, norm: Norm = "batch"
) -> nn.Module:
    """ShuffleNet V1 with three groups: 240, 480 and 960 channels."""
    stages, inputs = [_stem(in_channels)], _STEM
    for outputs, count in ((240, 4), (480, 8), (960, 4)):
        rest = (GroupedUnit(outputs, outputs, 1, groups=3) for _ in range(count - 1))
        stages.append(nn.Sequential(GroupedUnit(inputs, outputs, 2, groups=3), *rest))
        inputs = outputs
    return with_norm(StagedClassifier(stages, inputs, num_classes), norm)


@MODELS.register("shufflenetv2")
def shufflenetv2(
    num_classes: int, in_channels: int, image_size: int, *, norm: Norm = "batch"
) -> nn.Module:
    """ShuffleNet V2 at width 1: 116, 232 and 464 channels, 1024 before the head."""
    stages, inputs = [_stem(in_channels)], _STEM
    for outputs, count in ((116, 4), (232, 8), (464, 4)):
        rest = (SplitUnit(outputs) for _ in range(count - 1))
        stages.append(nn.Sequential(DownUnit(inputs, outputs), *rest))
        inputs = outputs
    neck = nn.Sequential(conv_bn(inputs, 1024, 1), nn.ReLU())
    return with_norm(StagedClassifier(stages, 1024, num_classes, neck=neck), norm)
