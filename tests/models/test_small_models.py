from typing import Any

import pytest
import torch
from torch import nn

from fedkd.data.features import basis_of
from fedkd.models import MODELS
from fedkd.models.build import build_model
from fedkd.models.network import Network, parameter_count
from fedkd.models.noise import add_noise
from fedkd.models.tokens import TransformerBlock, patch_size
from tests.models.built import built

NAMES = (
    "cnn_tiny", "cnn_small", "mlp", "mixer", "vit_tiny", "resnet8", "resnet50", "wrn_16_1", "vgg8",
    "mobilenetv2", "shufflenetv1", "shufflenetv2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("cnn_tiny", 8, 3_890),
        ("cnn_small", 28, 19_162),
        ("mlp", 8, 8_970),
        ("mixer", 8, 22_122),
        ("vit_tiny", 8, 51_946),
    ],
)
def test_sizes_stay_small(name: str, size: int, parameters: int) -> None:
    assert parameter_count(MODELS.create(name, 10, 1, size)) == parameters


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_all_image_sizes_go_forward_and_backward(name: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    body = MODELS.create(name, 10, channels, size)
    network = Network(body, mean=[0.5] * channels, std=[0.25] * channels)
    outputs = network.read(torch.rand(2, channels, size, size))
    assert outputs.logits.shape == (2, 10)
    assert all(stage.dim() == 4 and stage.shape[2] == stage.shape[3] for stage in outputs.stages)
    outputs.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["cnn_tiny", "cnn_small"])
@pytest.mark.parametrize(
    ("norm", "kind"), [("none", None), ("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)]
)
def test_norm_is_an_option(name: str, norm: str, kind: type[nn.Module] | None) -> None:
    body = MODELS.create(name, 10, 1, 8, norm=norm)
    kinds = {type(module) for module in body.modules()} & {nn.BatchNorm2d, nn.GroupNorm}
    assert kinds == ({kind} if kind else set())


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("cnn_small", {"norm": "layer"}, "norm: Input should be"),
        ("mixer", {"patch": 5}, "divisor of the image size 28, got 5"),
        ("vit_tiny", {"patch": 5}, "divisor of the image size 28, got 5"),
        ("vit_tiny", {"heads": 5}, "divisor of the width 32, got 5"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, option: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS.create(name, 10, 1, 28, **option)


def test_group_norm_does_not_mix_samples() -> None:
    torch.manual_seed(0)
    body = MODELS.create("cnn_small", 10, 1, 8, norm="group").train()
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(body(images)[:1], body(images[:1]))


def test_mlp_options_set_its_shape() -> None:
    linear = MODELS.create("mlp", 10, 1, 8, layers=0)
    assert parameter_count(linear) == 64 * 10 + 10
    wide = MODELS.create("mlp", 10, 1, 8, hidden=5, layers=1)
    assert parameter_count(wide) == 64 * 5 + 5 + 5 * 10 + 10


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (28, 4), (32, 4), (224, 28), (1, 1), (13, 13)])
def test_patches_leave_at_most_eight_by_eight(size: int, patch: int) -> None:
    assert patch_size(size, None) == patch


def test_attention_agrees_with_torchs_encoder_layer() -> None:
    torch.manual_seed(0)
    ours = TransformerBlock(8, heads=2)
    torchs = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_": ours.queries_keys_values,
        "self_attn.out_proj.": ours.project,
        "linear1.": ours.feed[0],
        "linear2.": ours.feed[2],
        "norm1.": ours.norm_attention,
        "norm2.": ours.norm_feed,
    }
    state = {p + key: v for p, m in pairs.items() for key, v in m.state_dict().items()}
    torchs.load_state_dict(state)
    tokens = torch.rand(3, 5, 8)
    torch.testing.assert_close(ours(tokens), torchs(tokens))


def test_transformer_taps_hold_the_patches_without_the_class_token() -> None:
    torch.manual_seed(0)
    body = MODELS.create("vit_tiny", 10, 1, 8, depth=1)
    kept: list[torch.Tensor] = []
    body.get_submodule("blocks.0").register_forward_hook(lambda _m, _i, out: kept.append(out))
    stages = Network(body, mean=[0.0], std=[1.0]).read(torch.rand(2, 1, 8, 8)).stages
    assert torch.equal(stages[-1][:, :, 1, 2], kept[0][:, 1 + 1 * 4 + 2])


@pytest.mark.parametrize(
    ("name", "branches"), [("resnet8", 3), ("wrn_16_1", 6), ("mixer", 8), ("vit_tiny", 8)]
)
def test_blocks_are_left_out_in_training_alone(name: str, branches: int) -> None:
    network = build_model(
        name, num_classes=3, in_channels=1, image_size=8, mean=[0.5], std=[0.2]
    )  # fmt: skip
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    before = network.eval()(images)
    add_noise(network, name, dropout=0.5, survival=0.8)
    assert torch.equal(network(images), before)
    hooks = [hook for m in network.body.modules() for hook in m._forward_hooks.values()]
    assert len(hooks) == branches
    network.train()
    torch.manual_seed(0)
    first = network(images)
    assert not torch.equal(first, network(images))


def test_what_is_kept_is_kept_as_often_as_asked_and_scaled() -> None:
    network = build_model(
        "mixer", num_classes=3, in_channels=1, image_size=8, mean=[0.5], std=[0.2],
        options={"depth": 1},
    )  # fmt: skip
    add_noise(network, "mixer", survival=0.5)
    last = network.body.get_submodule("blocks.0.mix_channels").train()
    torch.manual_seed(0)
    out = last(torch.ones(4000, 1, 32))
    kept = out.flatten(1).abs().sum(1) > 0
    assert abs(float(kept.double().mean()) - 0.5) < 0.03
    assert torch.allclose(out[kept][0], 2 * last.eval()(torch.ones(1, 1, 32))[0])


def _public(count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 6, 6), generator=generator).to(torch.uint8)


def test_a_linear_classifier_sees_principal_directions_of_the_public_images() -> None:
    images = _public()
    network = built(
        "linear", classes=4, channels=3, size=6, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.1],
        public=images, options={"directions": 5},
    )  # fmt: skip
    assert parameter_count(network) == 5 * 4
    pooled = network.read(images).pooled
    assert pooled is not None
    # Network normalises with a mean and std of its own; the directions are those of the pixels.
    assert torch.allclose(pooled, basis_of(images, 5)(images), atol=1e-4)
    assert not network(images).any()  # its weights begin at zero


def test_a_linear_classifier_carries_its_directions_along() -> None:
    images = _public()
    first = built("linear", classes=4, channels=3, size=6, public=images)
    torch.nn.init.normal_(first.body.head.weight)
    empty = torch.empty(0, 3, 6, 6, dtype=torch.uint8)
    again = built("linear", classes=4, channels=3, size=6, public=empty)
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(images), first(images))


def test_a_linear_classifier_without_public_images_is_refused() -> None:
    with pytest.raises(ValueError, match="'linear' is made from public images, and there are none"):
        built("linear")
    with pytest.raises(
        ValueError, match=r"'linear': directions: 10 public images .* most 9, got 24"
    ):
        built("linear", channels=3, size=6, public=_public(10))
