"""The shape all CIFAR families share: named stages, a neck, global pooling, one linear head.

A family module only says what its stages are made of. No operation works in place, because a
later in-place ReLU would silently rewrite the feature a hook has kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from fedkd.functional.options import Count
from fedkd.models import MODELS

Norm = Literal["batch", "group"]
"""`group` never mixes the samples of a batch, as DP-SGD requires."""


class StagedClassifier(nn.Module):
    """Stem and stages, then neck, global average and linear head.

    Args:
        stages: Modules run one after the other and offered as taps; the first is the stem.
        features: Channels that reach the head.
        num_classes: Width of the logits.
        neck: What runs after the last tap and before the pooling.

    Attributes:
        stages: `("stem", "stage1", ...)`.
        head_name: `"head"`.
        final_name: `"pool"`, whose input is the map that the head's input is the mean of.
    """

    stages: tuple[str, ...]
    head_name = "head"
    final_name = "pool"

    def __init__(
        self,
        stages: Sequence[nn.Module],
        features: int,
        num_classes: int,
        *,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stages = ("stem", *(f"stage{number}" for number in range(1, len(stages))))
        for name, stage in zip(self.stages, stages):
            self.add_module(name, stage)
        self.neck = neck or nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, h, w)."""
        x = images
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.head(self.pool(self.neck(x)).flatten(1))
        return logits


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Bias-free convolution that keeps the size at stride 1, and batch norm."""
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def group_norm(channels: int) -> nn.GroupNorm:
    """Eight groups, or as many of 4, 2 and 1 as divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


def with_norm(body: nn.Module, norm: Norm) -> nn.Module:
    """`body`, in place, with group norm for batch norm if `norm` says so.

    Neither draws its initial weights, so the other layers start from the same numbers.
    """
    if norm == "group":
        for name, module in list(body.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, attribute = name.rpartition(".")
                setattr(body.get_submodule(parent), attribute, group_norm(module.num_features))
    return body


def initialise(body: nn.Module, *, linear_std: float | None = None) -> nn.Module:
    """Normal convolutions with the ReLU gain over fan-out, zero biases; returns `body`.

    Args:
        body: Network to initialise in place.
        linear_std: Deviation of the linear weights, whose bias then starts at zero; None
            keeps torch's default for linear layers.
    """
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
    return body


def register(
    name: str, summary: str, build: Callable[..., nn.Module], *, width: int | None = None
) -> None:
    """Register a family member whose options are its norm and, if it has one, its width.

    Args:
        name: Name in configs.
        summary: One sentence, shown by `fedkd list models`.
        build: `(num_classes, in_channels, image_size) -> nn.Module`; with `width=` if that is
            given.
        width: Default channels of the first stage, for a family that is built in any width.
    """

    def member(
        num_classes: int, in_channels: int, image_size: int, *, norm: Norm = "batch"
    ) -> nn.Module:
        return with_norm(build(num_classes, in_channels, image_size), norm)

    def sized(
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        width: Count = width or 1,
        norm: Norm = "batch",
    ) -> nn.Module:
        return with_norm(build(num_classes, in_channels, image_size, width=width), norm)

    made: Callable[..., nn.Module] = member if width is None else sized
    made.__name__ = made.__qualname__ = name
    made.__doc__ = summary
    MODELS.register(name)(made)
