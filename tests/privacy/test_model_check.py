"""Models that Opacus would train although the guarantee would not hold are refused, with why."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.data.vision import models
from fedkd.models import MODELS
from fedkd.models.network import Network
from fedkd.models.peft import Peft, adapt
from fedkd.privacy.clipping import Clipping
from fedkd.privacy.model_check import check_private
from tests.models.built import built

SHAPE, CLASSES = (1, 8, 8), 4
CLIPPINGS: tuple[Clipping, ...] = ("hooks", "ghost")


def network(body: nn.Module) -> Network:
    return Network(body, mean=[0.5], std=[0.25])


def named(name: str, **options: object) -> Network:
    torch.manual_seed(0)
    return network(MODELS.create(name, CLASSES, *SHAPE[::2], **options))


def small(*between: nn.Module, first: nn.Module | None = None) -> nn.Sequential:
    """Convolution, `between` on maps (B, 4, 8, 8), linear head."""
    torch.manual_seed(0)
    conv = first or nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(conv, *between, nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES))


def vit() -> nn.Module:
    """With torch's own attention, for one-channel images."""
    body = models.VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=CLASSES)
    body.conv_proj = nn.Conv2d(1, 16, 4, stride=4)
    return body


def check(body: nn.Module, clipping: Clipping = "hooks") -> None:
    check_private(network(body), SHAPE, CLASSES, clipping=clipping)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class OwnBatchNorm(nn.BatchNorm2d):
    """A subclass, which Opacus' validator does not know."""


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Remembering(nn.Module):
    """Keeps a running mean where no buffer shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.center: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.center
        self.center = 0.9 * self.center + 0.1 * x.detach().mean()
        return out


class Counting(nn.Module):
    """Keeps a statistic in a buffer that it does not use itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean()
        return x


class SwappedAxes(nn.Module):
    """Leaves its maps in channels-last memory, as models do that permute inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Gain(nn.Module):
    """A layer with a parameter that Opacus has no rule for; it is right per example."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, None, None]


class TwoInputs(nn.Module):
    """A layer with parameters and two inputs; Opacus sees the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.mix + y


class CallsTwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = TwoInputs()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(2))


class BehindTheHooks(nn.Module):
    """Uses its head's weight a second time without calling the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x) + functional.linear(x.square(), self.head.weight)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.auxiliary = nn.Linear(64, CLASSES), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def channels_last() -> nn.Module:
    return small(nn.Conv2d(4, 4, 3, padding=1)).to(memory_format=torch.channels_last)


def spectral() -> nn.Module:
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(64, CLASSES))
    return nn.Sequential(nn.Flatten(), normed)


MIXES = "mixes the images of a batch"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: small(nn.BatchNorm2d(4)), MIXES),
    "frozen batch norm": (lambda: small(frozen(nn.BatchNorm2d(4))), MIXES),
    "batch norm without parameters": (lambda: small(nn.BatchNorm2d(4, affine=False)), MIXES),
    "another's batch norm": (lambda: small(OwnBatchNorm(4)), MIXES),
    "instance norm with statistics": (
        lambda: small(nn.InstanceNorm2d(4, track_running_stats=True)),
        "body.1 .InstanceNorm2d. keeps running statistics of private images",
    ),
    "reflecting convolution": (
        lambda: small(first=nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")),
        "body.0 .Conv2d. has padding_mode='reflect', which Opacus ignores",
    ),
    "in-place layer": (lambda: small(nn.ReLU(inplace=True)), "body.1 .ReLU. works in place"),
    "weights with channels last": (channels_last, "body.1.weight is in channels_last memory"),
    "maps with channels last": (
        lambda: small(nn.ReLU(), SwappedAxes(), nn.Conv2d(4, 4, 3, padding=1)),
        "wrong by|clipping norms",
    ),
    "all frozen": (lambda: frozen(small()), "no parameter is trainable"),
    "features centred over the batch": (
        lambda: small(Centred()),
        "the output for one image depends on the other images of the batch",
    ),
    "statistic in a buffer": (lambda: small(Counting()), "buffer body.1.seen changes in training"),
    "statistic out of sight": (lambda: small(Remembering()), "keeps a memory of the images"),
    "own noise": (lambda: small(Noisy()), "draws random numbers by other means than nn.Dropout"),
    "layer with two inputs": (CallsTwoInputs, "Opacus cannot give its gradients"),
    "weight behind the hooks": (BehindTheHooks, "wrong by|clipping norms"),
    "unused parameter": (Unused, "body.auxiliary.weight is not used; freeze it"),
    "recurrent over the batch": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(0, 1), nn.LSTM(64, CLASSES), First()),
        "the output for one image depends on the other images of the batch",
    ),
    "spectral norm": (spectral, "changes in training"),
    "attention of torch": (lambda: Attending(), "Opacus cannot give its gradients"),
}


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, object]) -> Tensor:
        return pair[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.squeeze(1)
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_break_the_guarantee_are_refused(case: str, clipping: Clipping) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        check(make(), clipping)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize(
    "part",
    [
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.Dropout(0.5),
        nn.Dropout2d(0.5),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        Gain(),
        frozen(nn.Conv2d(4, 4, 3, padding=1)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_layers_that_keep_images_apart_pass(part: nn.Module, clipping: Clipping) -> None:
    check(small(part), clipping)


def test_shared_weights_pass_with_hooks_alone() -> None:
    check(Tied(), "hooks")
    with pytest.raises(ValueError, match=r"first.weight and .*second.weight share a weight"):
        check(Tied(), "ghost")


def distances(logits: Tensor, labels: Tensor) -> Tensor:
    """RKD's way: distances between examples, scaled by their mean."""
    apart = (logits[:, None] - logits[None]).square().sum(2)
    return (apart / apart.mean()).mean(1)


def contrast(logits: Tensor, labels: Tensor) -> Tensor:
    likeness = logits @ logits.T
    own = torch.arange(len(labels))
    return functional.cross_entropy(likeness, own, reduction="none")


@pytest.mark.parametrize("mixing", [distances, contrast])
def test_a_loss_over_pairs_is_refused(mixing: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="the loss of one example depends on the other examples"):
        check_private(named("mlp"), SHAPE, CLASSES, criterion=mixing)


def test_a_loss_without_a_value_for_each_example_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"gives \(\) for 5 examples instead of one value for each"
    ):
        check_private(named("mlp"), SHAPE, CLASSES, criterion=functional.cross_entropy)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("name", ["cnn_tiny", "cnn_small", "mlp", "mixer", "vit_tiny", "resnet8"])
def test_small_models_pass(name: str, clipping: Clipping) -> None:
    options = {"norm": "group"} if "norm" in MODELS.options(name) else {}
    check_private(named(name, **options), SHAPE, CLASSES, clipping=clipping)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenetv2", "wrn_16_1", "vgg8"])
def test_one_of_each_convolutional_family_passes_with_group_norm(name: str) -> None:
    check_private(named(name, norm="group"), SHAPE, CLASSES)


@pytest.mark.parametrize("name", MODELS.names())
def test_every_registered_model_has_a_private_form(name: str) -> None:
    options = {"norm": "group"} if "norm" in MODELS.options(name) else {}
    with torch.device("meta"):
        parts = {type(module) for module in MODELS.create(name, 10, 3, 32, **options).modules()}
    assert nn.BatchNorm2d not in parts


def test_a_model_with_batch_norm_is_told_its_private_form() -> None:
    with pytest.raises(ValueError) as refusal:
        check_private(named("resnet8"), SHAPE, CLASSES, name="resnet8")
    assert str(refusal.value) == (
        "model 'resnet8' cannot be trained privately: "
        "body.stem.0.1 (BatchNorm2d) mixes the images of a batch, also when frozen or without "
        "parameters; body.stage1.0.branch.0.1 (BatchNorm2d) mixes the images of a batch, also "
        "when frozen or without parameters; body.stage1.0.branch.2.1 (BatchNorm2d) mixes the "
        "images of a batch, also when frozen or without parameters; and 6 more reasons. "
        "Take {name: resnet8, norm: group}"
    )


def test_another_model_is_told_of_one_that_works() -> None:
    with pytest.raises(ValueError, match=r"Take for example \{name: cnn_small, norm: group\}"):
        check(small(nn.BatchNorm2d(4)))


def test_the_check_leaves_the_model_and_the_generators_alone() -> None:
    tried = named("cnn_tiny", norm="group").eval()
    before = {name: tensor.clone() for name, tensor in tried.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    check_private(tried, SHAPE, CLASSES)
    assert torch.equal(torch.rand(()), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in tried.state_dict().items())
    assert not tried.training
    assert not any(hasattr(parameter, "grad_sample") for parameter in tried.parameters())


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("model", ["cnn_small", "vit_tiny"])
@pytest.mark.parametrize("method", ["lora", "adapter", "head"])
def test_adapters_beside_a_frozen_part_are_private(
    model: str, method: str, clipping: Clipping
) -> None:
    """Also beside batch norms: their statistics do not move, so they mix no images."""
    more = {"norm": "batch"} if model == "cnn_small" else {}
    adapted = adapt(built(model, CLASSES, options=more), Peft(method))
    check_private(adapted, SHAPE, CLASSES, name=model, clipping=clipping)


@pytest.mark.parametrize(
    ("body", "method", "message"),
    [
        (vit(), "lora", r"self_attention \(AttentionLoRA\) learns, and Opacus has no gradients"),
        (vit(), "bitfit", r"self_attention \(MultiheadAttention\) learns, and Opacus has no"),
        (named("cnn_tiny", norm="batch").body, "norm", r"stem.1 \(BatchNorm2d\) learns, and Opac"),
    ],
)
def test_adapters_without_gradients_for_each_image_are_refused(
    body: nn.Module, method: str, message: str
) -> None:
    adapted = adapt(built(copy.deepcopy(body), CLASSES), Peft(method))
    with pytest.raises(ValueError, match=message + ".*Take peft method adapter or head"):
        check_private(adapted, SHAPE, CLASSES, name="it")
