import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models.network import Network
from fedkd.models.taps import find_stages
from tests.models.built import built


class Functional(nn.Module):
    """A user's network: pooling is a function, one ReLU serves everywhere, nothing declared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(8 * 2 * 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.first(images)), 2)
        x = F.max_pool2d(self.relu(self.second(x)), 2)
        out: Tensor = self.classifier(x.flatten(1))
        return out


class Squeeze(nn.Module):
    """Narrows, filters at half the side in two branches, and weighs the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(inputs, inputs, 1), nn.Conv2d(inputs, outputs, 3, 2, padding=1)
        )
        self.right = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(inputs, outputs, 1))
        self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.left(x) + self.right(x)
        return out * self.weigh(out).sigmoid()


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


class Rounded(Functional):
    """Has no derivative."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).argmax(1, keepdim=True).expand(-1, 3).float()


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def pool(side: int = 1) -> nn.Module:
    return nn.AdaptiveAvgPool2d(side)


TRUNK = chain(conv(1, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 8), nn.ReLU())
UNPADDED = chain(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3))
FOUND: dict[str, tuple[nn.Module, int, tuple[str, ...]]] = {
    "a module that runs twice is passed over": (Functional(), 8, ("first", "second")),
    "also without a derivative": (Rounded(), 8, ("first", "second")),
    "blocks with branches are whole": (
        chain(conv(1, 4), Squeeze(4, 8), Squeeze(8, 8), pool(), nn.Flatten()),
        16,
        ("0", "1", "2"),
    ),
    "chains inside are opened": (chain(chain(TRUNK, pool(), nn.Flatten())), 8, ("0.0.1", "0.0")),
    "unpadded convolutions end none": (chain(*UNPADDED, nn.Flatten()), 28, ("1", "3")),
    "pooling alone is none": (chain(conv(1, 4), conv(4, 8, 2), pool()), 16, ("0", "1")),
    "nor is pooling to 2": (chain(conv(1, 4), conv(4, 8, 2), pool(2)), 16, ("0", "1")),
    "strided to a pixel": (chain(conv(1, 4), conv(4, 8, 2), conv(8, 8, 2)), 4, ("0", "1", "2")),
    "no maps": (chain(nn.Flatten(), nn.Linear(4, 2)), 2, ()),
}


@pytest.mark.parametrize("name", FOUND)
def test_stages_are_found(name: str) -> None:
    body, side, stages = FOUND[name]
    assert find_stages(body, torch.zeros(2, 1, side, side)) == stages


@pytest.mark.parametrize("frozen", [False, True])
def test_a_branch_that_the_logits_do_not_depend_on_gives_no_stage(frozen: bool) -> None:
    class Deep(nn.Module):
        """Computes a second head at once, and gives it in training only."""

        def __init__(self) -> None:
            super().__init__()
            self.first = conv(1, 4)
            self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), conv(4, 3), nn.AdaptiveAvgPool2d(1))
            self.second = nn.Sequential(nn.ReLU(inplace=True), conv(4, 8, 2))
            self.fc = nn.Linear(8 * 8 * 8, 3)

        def forward(self, images: Tensor) -> object:
            x = self.first(images)
            aux = self.aux(x).flatten(1)
            logits = self.fc(self.second(x).flatten(1))
            return (logits, aux) if self.training else logits

    body = Deep().requires_grad_(not frozen)
    assert find_stages(body, torch.zeros(2, 1, 16, 16)) == ("second.0", "second")


def test_search_leaves_modes_statistics_and_hooks_alone() -> None:
    body = nn.Sequential(conv(1, 4), nn.BatchNorm2d(4), nn.Flatten())
    body[1].eval()
    find_stages(body, torch.zeros(2, 1, 4, 4))
    assert [body.training, body[0].training, body[1].training] == [True, True, False]
    assert body[1].num_batches_tracked == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.modules())


def test_search_that_fails_leaves_no_hooks() -> None:
    body = nn.Sequential(conv(1, 4), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        find_stages(body, torch.zeros(2, 1, 4, 4))
    assert body.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.modules())


def torchvision(name: str, channels: int, size: int) -> Network:
    return built(f"torchvision/{name}", 7, channels, size)


def shapes(network: Network, channels: int, size: int) -> list[tuple[int, ...]]:
    outputs = network.eval().read(torch.zeros(2, channels, size, size, dtype=torch.uint8))
    assert outputs.logits.shape == (2, 7)
    return [tuple(stage.shape[1:3]) for stage in outputs.stages]


def test_torchvision_resnet18_is_tapped_at_its_layers() -> None:
    network = torchvision("resnet18", 3, 64)
    assert network.stage_names == ("relu", "layer1", "layer2", "layer3", "layer4")
    assert network.head_name == "fc"
    assert shapes(network, 3, 64) == [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)]


def test_torchvision_mobilenet_is_tapped_between_its_blocks() -> None:
    network = torchvision("mobilenet_v3_small", 1, 28)
    names = ("features.0", "features.1", "features.3", "features.8", "features")
    assert network.stage_names == names
    assert network.head_name == "classifier.3"
    assert shapes(network, 1, 28) == [(16, 14), (16, 7), (24, 4), (48, 2), (576, 1)]


def test_layers_that_share_one_pixel_are_one_stage() -> None:
    # From 8x8, resnet18 reaches one pixel in layer2 already and stays there.
    assert torchvision("resnet18", 1, 8).stage_names == ("relu", "layer1", "layer4")
