"""Wide residual networks with pre-activation, in the shapes of the CRD and mdistiller benchmarks.

The stage features are raw residual sums, so they are signed: batch norm and ReLU come later,
at the head of the next block.

References:
    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016,
    https://arxiv.org/abs/1605.07146
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fedkd.models.staged import StagedClassifier, initialise, register


class PreActivation(nn.Module):
    """Norm, ReLU, convolution, twice, added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        activated = self.activate(x)
        # A block that changes the width projects the activated input, not the raw sum.
        kept: Tensor = x if self.shortcut is None else self.shortcut(activated)
        return kept + self.branch(activated)


def _wrn(
    num_classes: int, in_channels: int, image_size: int, *, depth: int, widen: int
) -> nn.Module:
    widths = (16, 16 * widen, 32 * widen, 64 * widen)
    count = (depth - 4) // 6
    stages: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)]
    for number in range(3):
        inputs, outputs = widths[number], widths[number + 1]
        first = PreActivation(inputs, outputs, 1 if number == 0 else 2)
        rest = (PreActivation(outputs, outputs, 1) for _ in range(count - 1))
        stages.append(nn.Sequential(first, *rest))
    neck = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    body = StagedClassifier(stages, widths[-1], num_classes, neck=neck)
    nn.init.zeros_(body.head.bias)
    return initialise(body)


for _depth, _widen in ((16, 1), (16, 2), (40, 1), (40, 2)):
    register(
        f"wrn_{_depth}_{_widen}",
        f"Wide ResNet {_depth}-{_widen}: pre-activation, up to {64 * _widen} channels.",
        partial(_wrn, depth=_depth, widen=_widen),
    )
