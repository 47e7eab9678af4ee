"""MobileNetV2 at half width, in the shape of the CRD and mdistiller benchmarks.

References:
    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
    https://arxiv.org/abs/1801.04381
"""

from __future__ import annotations

from torch import Tensor, nn

from fedkd.models import MODELS
from fedkd.models.staged import Norm, StagedClassifier, conv_bn, initialise, with_norm

# Per tap: groups of (expands, full-width channels, blocks, stride of the first block).
_STAGES = (
    ((False, 16, 1, 1), (True, 24, 2, 1)),
    ((True, 32, 3, 2),),
    ((True, 64, 4, 2), (True, 96, 3, 1)),
    ((True, 160, 3, 2), (True, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """Widen with 1x1, filter each channel with 3x3, narrow with 1x1 and no activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.branch = nn.Sequential(
            conv_bn(inputs, inner, 1),
            nn.ReLU(),
            conv_bn(inner, inner, stride=stride, groups=inner),
            nn.ReLU(),
            conv_bn(inner, outputs, 1),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        out: Tensor = self.branch(x)
        return x + out if self.is_residual else out


@MODELS.register("mobilenetv2")
def mobilenetv2(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    width: float = 0.5,
    expansion: int = 6,
    norm: Norm = "batch",
) -> nn.Module:
    """MobileNetV2 for small images, half as wide as the paper's by default.

    Args:
        width: Multiplier of all channels but the last 1280.
        expansion: Widening inside a block (T in the benchmarks' tables).
        norm: What normalises the features after each convolution.
    """
    inputs = int(32 * width)
    stages: list[nn.Module] = [nn.Sequential(conv_bn(in_channels, inputs, stride=2), nn.ReLU())]
    for groups in _STAGES:
        blocks = []
        for expands, channels, count, first_stride in groups:
            outputs = int(channels * width)
            for number in range(count):
                stride = first_stride if number == 0 else 1
                # The official first block keeps its 1x1 convolution although it widens by 1.
                blocks.append(
                    InvertedResidual(inputs, outputs, stride, expansion if expands else 1)
                )
                inputs = outputs
        stages.append(nn.Sequential(*blocks))
    features = int(1280 * max(width, 1.0))
    neck = nn.Sequential(conv_bn(inputs, features, 1), nn.ReLU())
    body = StagedClassifier(stages, features, num_classes, neck=neck)
    return with_norm(initialise(body, linear_std=0.01), norm)
