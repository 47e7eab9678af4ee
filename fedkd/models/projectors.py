"""Small networks that carry a student's feature map to the width and size of a teacher's.

All end in batch norm, which must be in training mode while the student learns. A final ReLU can
never meet a map with negative values, so it is optional.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Module):
    """Resizes, convolves, normalises, (B, D, h, w) -> (B, D', h', w').

    Args:
        conv: What maps the D channels to D'.
        channels: D'.
        relu: Whether a ReLU comes last.
        size: Size to bring the map to before all else: averaged if it is larger, else
            interpolated; None leaves it.
    """

    def __init__(
        self, conv: nn.Module, channels: int, *, relu: bool, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(channels)
        self.relu = relu
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D', h', w')."""
        if self.size is not None and maps.shape[2:] != self.size:
            if maps.shape[2] >= self.size[0]:
                maps = F.adaptive_avg_pool2d(maps, self.size)
            else:
                maps = F.interpolate(maps, self.size, mode="bilinear")
        maps = self.bn(self.conv(maps))
        return torch.relu_(maps) if self.relu else maps


def regressor(student: Sequence[int], teacher: Sequence[int], *, relu: bool = True) -> Projector:
    """One convolution chosen by the two sizes, the regressor of FitNets as everybody builds it.

    A student's map of twice the side takes a 3x3 convolution of stride 2, one of half the side a
    transposed 4x4 of stride 2, one as large or larger a valid convolution (1x1 when equal), and
    one of a quarter of the side is interpolated before a 3x3 (CA-MKD).

    Args:
        student: Shape of its map, (D, h, w).
        teacher: Shape of its map.
        relu: Whether a ReLU comes last, as published.

    Raises:
        ValueError: no convolution fits the sizes.

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
            https://arxiv.org/abs/1412.6550
        Zhang et al., "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022,
            https://arxiv.org/abs/2201.00007
    """
    (ours, *here), (theirs, *there) = student, teacher
    conv: nn.Module
    size = None
    if here == [2 * side for side in there]:
        conv = nn.Conv2d(ours, theirs, 3, stride=2, padding=1)
    elif there == [2 * side for side in here]:
        conv = nn.ConvTranspose2d(ours, theirs, 4, stride=2, padding=1)
    elif all(a >= b for a, b in zip(here, there)):
        conv = nn.Conv2d(ours, theirs, (1 + here[0] - there[0], 1 + here[1] - there[1]))
    elif there == [4 * side for side in here]:
        conv = nn.Conv2d(ours, theirs, 3, padding=1)
        size = (there[0], there[1])
    else:
        raise ValueError(
            f"no regressor leads from maps of {_size(here)} to {_size(there)}: "
            "a larger map must be 2 or 4 times as large"
        )
    return Projector(conv, theirs, relu=relu, size=size)


def bottleneck(
    student: Sequence[int], teacher: Sequence[int], *, relu: bool = True, hidden: int = 256
) -> Projector:
    """1x1, 3x3 and 1x1 convolutions over `hidden` channels, without activation in between.

    Raises:
        ValueError: the maps differ in size.

    References:
        Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
            Distillation", NeurIPS 2024, https://arxiv.org/abs/2412.08139
    """
    (ours, *here), (theirs, *there) = student, teacher
    if here != there:
        raise ValueError(f"a bottleneck keeps the size, got {_size(here)} and {_size(there)}")
    conv = nn.Sequential(
        nn.Conv2d(ours, hidden, 1),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.Conv2d(hidden, theirs, 1),
    )
    return Projector(conv, theirs, relu=relu)


def embedding(
    student: Sequence[int],
    teacher: Sequence[int],
    *,
    relu: bool = True,
    convs: bool = False,
    factor: int = 2,
) -> Projector:
    """CA-MKD's projection: the map brought to the teacher's size, then a 1x1 convolution.

    Args:
        student: Shape of its map, (D, h, w).
        teacher: Shape of its map.
        relu: Whether a ReLU comes last, as published.
        convs: 1x1, 3x3 and 1x1 convolutions with batch norm and ReLU between them instead.
        factor: How many times narrower than the student's map these are in the middle.

    References:
        Zhang et al., "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022,
            https://arxiv.org/abs/2201.00007
    """
    (ours, *_), (theirs, height, width) = student, teacher
    conv: nn.Module = nn.Conv2d(ours, theirs, 1)
    if convs:
        middle = ours // factor
        conv = nn.Sequential(
            nn.Conv2d(ours, middle, 1),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, padding=1),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, theirs, 1),
        )
    return Projector(conv, theirs, relu=relu, size=(height, width))


def _size(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
