"""The CIFAR families have the published shapes; the numbers are those measured on mdistiller."""

import pytest
import torch
from torch import Tensor

from fedkd.models import MODELS
from fedkd.models.network import Network, Outputs, parameter_count
from fedkd.models.shufflenet import Shuffle

RESNET = ((16, 32), (16, 32), (32, 16), (64, 8))
RESNET_X4 = ((32, 32), (64, 32), (128, 16), (256, 8))
VGG = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 4))
WRN_2 = ((16, 32), (32, 32), (64, 16), (128, 8))

# name: parameters at 100 classes and 3x32x32, (channels, side) of each tap, pooled features.
PUBLISHED = {
    "resnet20": (278_324, RESNET, 64),
    "resnet32": (472_756, RESNET, 64),
    "resnet56": (861_620, RESNET, 64),
    "resnet110": (1_736_564, RESNET, 64),
    "resnet8x4": (1_233_540, RESNET_X4, 256),
    "resnet32x4": (7_433_860, RESNET_X4, 256),
    "wrn_16_2": (703_284, WRN_2, 128),
    "wrn_40_1": (569_780, RESNET, 64),
    "wrn_40_2": (2_255_156, WRN_2, 128),
    "vgg8": (3_965_028, VGG, 512),
    "vgg13": (9_462_180, VGG, 512),
    "resnet50": (23_705_252, ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)), 2048),
    "mobilenetv2": (812_836, ((16, 16), (12, 16), (16, 8), (48, 4), (160, 2)), 1280),
    "shufflenetv1": (949_258, ((24, 32), (240, 16), (480, 8), (960, 4)), 960),
    "shufflenetv2": (1_355_528, ((24, 32), (116, 16), (232, 8), (464, 4)), 1024),
}
OTHERS = ("resnet8", "resnet14", "resnet44", "wrn_16_1", "vgg11", "vgg16", "vgg19")


def network(name: str, num_classes: int, channels: int, size: int) -> Network:
    torch.manual_seed(0)
    body = MODELS.create(name, num_classes, channels, size)
    return Network(body, mean=[0.5] * channels, std=[0.25] * channels)


def read_on_meta(name: str, size: int = 32) -> tuple[Network, Outputs]:
    """Shapes without arithmetic: the meta device runs the big ones in no time."""
    with torch.device("meta"):
        built = network(name, 100, 3, size)
        return built, built.read(torch.zeros(2, 3, size, size))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_features_are_the_published_ones(name: str) -> None:
    parameters, stages, pooled = PUBLISHED[name]
    built, outputs = read_on_meta(name)
    assert parameter_count(built) == parameters
    assert [tuple(x.shape) for x in outputs.stages] == [(2, c, s, s) for c, s in stages]
    assert outputs.pooled is not None
    assert outputs.pooled.shape == (2, pooled)
    assert outputs.logits.shape == (2, 100)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_depths_share_their_familys_features(name: str) -> None:
    stages = VGG if name.startswith("vgg") else RESNET
    outputs = read_on_meta(name)[1]
    assert [tuple(x.shape) for x in outputs.stages] == [(2, c, s, s) for c, s in stages]


def test_every_member_says_what_it_is() -> None:
    for name in (*PUBLISHED, *OTHERS):
        assert MODELS.summary(name).endswith(".")


def test_vgg_pools_a_fourth_time_from_64_pixels_on() -> None:
    assert read_on_meta("vgg8", 64)[1].stages[-1].shape == (2, 512, 4, 4)


def last_stage(name: str) -> Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return network(name, 10, 3, 32).read(images).stages[-1]


def test_resnet_stages_are_rectified_and_wide_resnet_stages_signed() -> None:
    assert last_stage("resnet8").min() >= 0
    assert last_stage("wrn_16_1").min() < 0


def test_shuffle_deals_groups_out_like_cards() -> None:
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert Shuffle(3)(channels).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_mobilenet_width_is_an_option() -> None:
    with torch.device("meta"):
        half = MODELS.create("mobilenetv2", 100, 3, 32)
        full = MODELS.create("mobilenetv2", 100, 3, 32, width=1.0)
    # torchvision's mobilenet_v2 at 100 classes has 2,351,972; the benchmarks' first block
    # keeps a 1x1 convolution (32 * 32) and its batch norm (64) more.
    assert parameter_count(full) == 2_351_972 + 32 * 32 + 64
    assert parameter_count(half) == 812_836
