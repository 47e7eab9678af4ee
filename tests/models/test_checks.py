"""Networks of an experiment are tried before a round, in the mode they will be in."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.config import ConfigError
from fedkd.models.checks import check_network, check_training
from fedkd.models.network import Network
from fedkd.rounds.context import ExperimentContext
from tests.conftest import TINY
from tests.models.built import built


class TwoFaced(nn.Module):
    """A second answer in training mode; draws, counts and normalises over the batch."""

    def __init__(self, inputs: int, classes: int, tell: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs)
        self.fc = nn.Linear(inputs, classes)
        self.drop = nn.Dropout(0.5)
        self.tell = tell

    def forward(self, images: Tensor) -> Any:
        logits = self.fc(self.drop(self.norm(images.flatten(1))))
        return (logits, logits) if self.training and self.tell else logits


def plugin_two_faced(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Auxiliary logits in training."""
    return TwoFaced(in_channels * image_size**2, num_classes)


def plugin_headless(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Log-probabilities."""
    linear = nn.Linear(in_channels * image_size**2, num_classes)
    return nn.Sequential(nn.Flatten(), linear, nn.LogSoftmax(1))


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {name: fedkd.MODELS.get(name) for name in fedkd.MODELS.names()}
    mine = {"two_faced": plugin_two_faced, "headless": plugin_headless}
    monkeypatch.setattr(fedkd.MODELS, "_members", {**members, **mine})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.model=two_faced",
            r"student.model: 'two_faced': .*in training mode gives a tuple",
        ),
        ("teachers.models=[two_faced]", "teachers.models.0: 'two_faced': .*in training mode"),
        (
            "student.model=headless",
            r"student.model: 'headless': .*output is the logits.*\(needed by loss 'rkd'\)",
        ),
    ],
)
def test_an_experiment_names_key_network_and_loss(
    plugins: None, override: str, message: str
) -> None:
    words = ["teachers.models=[mlp]", "student.model=mlp", "distillation.losses=[kd, rkd]"]
    experiment = fedkd.make_experiment(TINY, [*words, override])
    with pytest.raises(ConfigError, match=f"^{message}"):
        ExperimentContext(experiment)


@pytest.mark.parametrize("training", [True, False])
def test_a_trial_leaves_no_trace(training: bool) -> None:
    network = Network(TwoFaced(4, 3, tell=False), mean=[0.5], std=[0.5]).train(training)
    network.body.norm.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    images = torch.randint(256, (1, 1, 2, 2), dtype=torch.uint8)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    for check in (check_network, check_training):
        check(network, "it", images, 3, "here")
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, "'num_classes' cannot be set"),
        ({"transform_input": True}, "'transform_input' cannot be set: .*normalised twice"),
    ],
)
def test_options_of_torchvision_that_cannot_be_right_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"model 'torchvision/googlenet': option {message}"):
        built("torchvision/googlenet", 3, 3, 64, options=options)
