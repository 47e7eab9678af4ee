from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkd.models.build import build_model, model_names
from tests.models.built import built


class Returns(nn.Module):
    """A user's classifier that answers with what it is given."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(self.shape)


def user_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize("name", ["cnn_tiny", "resnet8", "torchvision/mobilenet_v3_small"])
def test_seed_decides_the_weights_and_the_global_generator_stays(name: str) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = built(name).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second, other = built(name).state_dict(), built(name, seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_trial_run_leaves_training_mode_and_statistics_alone() -> None:
    network = built("resnet8")
    assert all(module.training for module in network.modules())
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {0}


def test_options_reach_the_model() -> None:
    assert built("mlp", options={"hidden": 5, "layers": 1}).body.head.in_features == 5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_torchvision_takes_any_number_of_channels(name: str) -> None:
    grey = built(f"torchvision/{name}", size=32)
    convolution = next(m for m in grey.body.modules() if isinstance(m, nn.Conv2d))
    assert convolution.in_channels == 1
    assert grey(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_replaced_convolution_keeps_the_scale_torchvision_chose() -> None:
    weights = [
        built("torchvision/resnet18", channels=c, size=32).body.conv1.weight.std() for c in (3, 1)
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=0.1, atol=0)


def test_torchvision_transformers_are_built_for_the_image_size() -> None:
    network = built("torchvision/swin_t", size=32)
    assert network.stage_names == ("features.0.0", "permute")


def test_torchvision_options_are_passed_on() -> None:
    network = built("torchvision/mobilenet_v3_small", size=32, options={"dropout": 0.5})
    assert network.body.classifier[2].p == 0.5


def test_ready_module_keeps_its_weights_and_gets_taps() -> None:
    body = user_cnn()
    weight = body[0].weight.clone()
    network = built(body)
    assert network.body is body
    assert torch.equal(body[0].weight, weight)
    assert network.stage_names == ("1", "3")
    assert network.head_name == "6"


def test_declared_stages_are_respected() -> None:
    body = user_cnn()
    body.stages = ("0",)
    assert built(body).stage_names == ("0",)


def test_list_of_modules_called_stages_is_not_taken_for_names() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([user_cnn()])

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.stages[0](images)
            return out

    assert built(Body()).stage_names == ("stages.0.1", "stages.0.3")


def test_names_list_ours_and_torchvisions() -> None:
    names = model_names()
    assert {"resnet20", "wrn_40_2", "cnn_small", "torchvision/resnet18"} <= set(names)
    assert len(names) == len(set(names))
    assert "torchvision/fcn_resnet50" not in names  # a segmentation model


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("resnet21", {}, "unknown model 'resnet21'; did you mean 'resnet"),
        ("torchvision/resnet19", {}, "unknown model 'torchvision/resnet19'; did you mean"),
        ("mlp", {"options": {"hiden": 3}}, "no option 'hiden'; did you mean 'hidden'?"),
        ("torchvision/resnet18", {"options": {"depth": 3}}, "'torchvision/resnet18'.*'depth'"),
        (
            "torchvision/inception_v3",
            {"size": 32},
            "'torchvision/inception_v3' cannot take 1x32x32 images",
        ),
        ("torchvision/maxvit_t", {"size": 28}, "cannot be built for 28x28 images"),
        (Returns(2, 9), {}, r"'Returns': expected logits \(2, 10\) for two 1x8x8 .*got \(2, 9\)"),
        (nn.Linear(3, 10), {}, "'Linear' cannot take 1x8x8 images"),
        (nn.LSTM(8, 10), {"channels": 8}, "'LSTM'"),
        (user_cnn(), {"options": {"width": 2}}, "takes no options"),
        ("mlp", {"mean": [0.5] * 3}, "mean: expected 1 values, got 3"),
    ],
)
def test_errors_name_the_model_what_was_expected_and_what_came(
    model: str | nn.Module, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        built(model, **changes)


def test_network_is_not_wrapped_twice() -> None:
    with pytest.raises(ValueError, match="got a Network"):
        built(built("cnn_tiny"))


@pytest.mark.parametrize(
    "name", ["cnn_small", "mixer", "wrn_16_1", "mobilenetv2", "torchvision/resnet18"]
)
def test_the_pooled_feature_is_the_mean_of_the_final_map(name: str) -> None:
    network = built(name, 5, 3, 32).eval()
    outputs = network.read(torch.rand(2, 3, 32, 32))
    assert outputs.final is not None
    assert outputs.pooled is not None
    assert network.head is not None
    torch.testing.assert_close(outputs.final.mean((2, 3)), outputs.pooled)
    torch.testing.assert_close(network.head(outputs.pooled), outputs.logits)


@pytest.mark.parametrize("name", ["mlp", "torchvision/vgg11"])
def test_a_network_without_a_map_under_a_linear_classifier_says_so(name: str) -> None:
    network = built(name, 5, 3, 32).eval()
    assert network.read(torch.rand(2, 3, 32, 32)).final is None


@pytest.mark.parametrize("hidden", [-5, 10**12])
def test_sizes_that_no_layer_can_have_are_named(hidden: int) -> None:
    with pytest.raises(ValueError, match=f"'mlp' cannot be built with hidden={hidden}: "):
        built("mlp", options={"hidden": hidden})


def test_a_ready_module_of_timm_says_how_its_images_are_normalised() -> None:
    def made(**options: Any) -> list[str]:
        body = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        body.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "input_size": (3, 224, 224)}
        said: list[str] = []
        network = build_model(
            body,
            num_classes=4,
            in_channels=3,
            image_size=8,
            mean=[0.1] * 3,
            std=[0.3] * 3,
            options=options,
            notify=said.append,
        )
        assert network.mean.flatten().tolist() == pytest.approx(options.get("mean", [0.1] * 3))
        return said

    (line,) = made()
    assert "Sequential is normalised by the images at hand (mean [0.1, 0.1, 0.1]" in line
    assert "mean [0.5, 0.5, 0.5], std [0.2, 0.2, 0.2]" in line
    assert made(mean=[0.5] * 3, std=[0.2] * 3) == []
