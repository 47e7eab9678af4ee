"""The shape all CIFAR families share: named stages, a neck, global pooling, one linear head.

A family module only says what its stages are made of. No operation works in place, because a
later in-place ReLU would silently rewrite the feature a hook has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fedkd.models import MODELS


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


def register(name: str, summary: str, build: Callable[[int, int, int], nn.Module]) -> None:
    """Register a family member that has no options of its own.

    Args:
        name: Name in configs.
        summary: One sentence, shown by `fedkd list models`.
        build: `(num_classes, in_channels, image_size) -> nn.Module`.
    """

    def member(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
        return build(num_classes, in_channels, image_size)

    member.__name__ = member.__qualname__ = name
    member.__doc__ = summary
    MODELS.register(name)(member)
