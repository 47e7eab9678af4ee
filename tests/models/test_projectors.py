"""Projectors: the shape for every pair of sizes, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.models.projectors import bottleneck, embedding, regressor


@pytest.mark.parametrize(
    ("here", "there", "kind", "kernel"),
    [
        ((8, 8), (8, 8), nn.Conv2d, (1, 1)),
        ((8, 8), (4, 4), nn.Conv2d, (3, 3)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4)),
        ((7, 9), (5, 4), nn.Conv2d, (3, 6)),
        ((8, 8), (2, 2), nn.Conv2d, (7, 7)),
        ((2, 2), (8, 8), nn.Conv2d, (3, 3)),
    ],
)
def test_the_convolution_follows_from_the_sizes(here, there, kind, kernel):
    project = regressor((2, *here), (5, *there))
    assert type(project.conv) is kind
    assert project.conv.kernel_size == kernel
    assert project.conv.bias is not None
    maps = project(torch.randn(3, 2, *here))
    assert maps.shape == (3, 5, *there)
    assert (maps >= 0).all()
    assert (regressor((2, *here), (5, *there), relu=False)(torch.randn(3, 2, *here)) < 0).any()


def test_sizes_without_a_convolution():
    with pytest.raises(ValueError, match=r"4x4 to 6x6.*2 or 4 times"):
        regressor((2, 4, 4), (5, 6, 6))
    with pytest.raises(ValueError, match=r"4x8 to 6x6"):
        regressor((2, 4, 8), (5, 6, 6))


def test_a_quarter_of_the_side_is_interpolated_first():
    project, maps = regressor((2, 2, 2), (5, 8, 8), relu=False).eval(), torch.randn(1, 2, 2, 2)
    larger = F.interpolate(maps, (8, 8), mode="bilinear")
    torch.testing.assert_close(project(maps), project.bn(project.conv(larger)))


def test_the_bottleneck_has_no_activation_in_between():
    project = bottleneck((2, 4, 4), (5, 4, 4))
    assert [c.kernel_size for c in project.conv] == [(1, 1), (3, 3), (1, 1)]
    assert [c.out_channels for c in project.conv] == [256, 256, 5]
    assert project(torch.randn(2, 2, 4, 4)).shape == (2, 5, 4, 4)
    with pytest.raises(ValueError, match="keeps the size, got 4x4 and 8x8"):
        bottleneck((2, 4, 4), (5, 8, 8))


@pytest.mark.parametrize("convs", [False, True])
@pytest.mark.parametrize("side", [2, 4, 8])
def test_embeddings_come_in_the_teachers_size(side, convs):
    project, maps = (
        embedding((6, side, side), (5, 4, 4), convs=convs),
        torch.randn(2, 6, side, side),
    )
    assert project(maps).shape == (2, 5, 4, 4)
    if side == 8:
        pooled = F.adaptive_avg_pool2d(maps, 4)
        project.eval()
        torch.testing.assert_close(project(maps), project(pooled))
    widths = [m.out_channels for m in project.modules() if isinstance(m, nn.Conv2d)]
    assert widths == ([3, 3, 5] if convs else [5])


def test_parameters_are_torchs_own_draws():
    torch.manual_seed(0)
    ours = regressor((2, 4, 4), (5, 4, 4))
    torch.manual_seed(0)
    assert torch.equal(ours.conv.weight, nn.Conv2d(2, 5, 1).weight)
