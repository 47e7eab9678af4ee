"""The classifier is the linear layer whose output is the logits; nothing is guessed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models.build import build_model, model_names
from fedkd.models.head import find_classifier
from fedkd.models.network import Network

IMAGES = torch.zeros(2, 1, 8, 8)


class Body(nn.Module):
    """A network around a 64 -> 8 feature, its layers registered in any order."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Linear(64, 8)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def feature(self, images: Tensor) -> Tensor:
        return self.trunk(images.flatten(1)).relu()


class Gated(Body):
    def forward(self, images: Tensor) -> Tensor:
        h = self.feature(images)
        return self.fc(h * self.gate(h).sigmoid())


class TwoHeads(Body):
    """DeiT: both heads averaged."""

    def forward(self, images: Tensor) -> Any:
        h = self.feature(images)
        one, other = self.fc(h), self.distilled(h)
        return (one, other) if self.training else (one + other) / 2


class Auxiliary(Body):
    """Inception: a second head that only counts in training, registered and run last."""

    def forward(self, images: Tensor) -> Any:
        h = self.feature(images)
        out = self.fc(h)
        aux = self.aux(h)
        return (out, aux) if self.training else out


class Scaled(Body):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.feature(images)) / 2


class ScaledInPlace(Body):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.feature(images)).div_(2)


class Added(Body):
    """LoRA: the low-rank part starts at zero, so only by value both are the same."""

    def forward(self, images: Tensor) -> Tensor:
        h = self.feature(images)
        nn.init.zeros_(self.up.weight)
        return self.fc(h) + self.up(self.down(h))


class Cut(Body):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.feature(images))[:, :4]


class Again(Body):
    """The head runs once more afterwards, for something else."""

    def forward(self, images: Tensor) -> Tensor:
        h = self.feature(images)
        logits = self.fc(h)
        self.fc(h.neg())
        return logits


class Recurrent(Body):
    """One layer runs several times; the last time gives the logits."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.trunk(images.flatten(1))
        return self.fc(self.fc(x).relu())


class Keyword(Body):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(input=self.feature(images))


class Tokens(Body):
    """The head sees all tokens, and one of them is the answer."""

    def forward(self, images: Tensor) -> Tensor:
        h = self.feature(images)
        return self.fc(torch.stack([h, -h], 1))[:, 0]


class Attended(Body):
    """Attention pooling, whose projection is registered last."""

    def forward(self, images: Tensor) -> Tensor:
        h = self.feature(images)[:, None]
        return self.fc(self.pool(h, h, h)[0][:, 0])


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(input), F.normalize(self.weight))


def linear() -> nn.Linear:
    return nn.Linear(8, 4)


def pooled_by(*before: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), *before, linear()
    )


with_head = [
    (Gated(fc=linear(), gate=nn.Linear(8, 8)), "fc"),
    (Auxiliary(fc=linear(), aux=linear()), "fc"),
    (Recurrent(fc=nn.Linear(8, 8)), "fc"),
    (Keyword(fc=linear()), "fc"),
    (Attended(fc=linear(), pool=nn.MultiheadAttention(8, 2, batch_first=True)), "fc"),
    (Gated(fc=nn.LazyLinear(4), gate=nn.LazyLinear(8)), "fc"),
    (Gated(fc=nn.utils.parametrizations.weight_norm(linear()), gate=nn.Linear(8, 8)), "fc"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sequential(nn.Dropout(), linear())), "2.1"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False), nn.Identity()), "1"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Dropout(0.3)), "1"),
]
without_head = [
    TwoHeads(fc=linear(), distilled=linear()),
    Scaled(fc=linear()),
    ScaledInPlace(fc=linear()),
    Added(fc=linear(), down=nn.Linear(8, 2), up=nn.Linear(2, 4)),
    Cut(fc=nn.Linear(8, 6)),
    Again(fc=linear()),
    Tokens(fc=linear()),
    Gated(fc=Cosine(8, 4), gate=nn.Linear(8, 8)),
    nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LogSoftmax(1)),
    nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(inplace=True)),
    nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(1, 4, 2), nn.Flatten()),
]


def name_of(value: object) -> str:
    return type(value).__name__


def build(body: nn.Module | str, classes: int = 4) -> Network:
    return build_model(
        body, num_classes=classes, in_channels=1, image_size=8, mean=[0.4], std=[0.3], seed=1
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("body", "head"), with_head, ids=name_of)
def test_the_head_is_the_layer_whose_output_is_the_logits(
    body: nn.Module, head: str, training: bool
) -> None:
    body.train(training)
    network = build(body, 8 if isinstance(body, Recurrent) else 4)
    assert network.head_name == head
    assert network.body.training is training
    network.eval()
    seen = network.read(torch.rand(3, 1, 8, 8))
    assert seen.pooled is not None
    assert network.head is not None
    torch.testing.assert_close(network.head(seen.pooled), seen.logits)


@pytest.mark.parametrize("body", without_head, ids=name_of)
def test_no_head_rather_than_a_wrong_one(body: nn.Module) -> None:
    network = build(body)
    assert network.head_name is None
    assert network.head is None
    assert network.eval().read(torch.rand(3, 1, 8, 8)).pooled is None


def test_old_weight_norm_is_a_head_too() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(linear())
    assert build(Gated(gate=nn.Linear(8, 8), fc=layer)).head_name == "fc"


@pytest.mark.parametrize(
    ("before", "final"),
    [
        ([nn.Flatten()], "2"),
        ([nn.Flatten(), nn.Dropout()], "2"),
        ([nn.Flatten(), nn.ReLU(inplace=True)], None),
        ([nn.Flatten(), nn.BatchNorm1d(8)], None),
        ([nn.Flatten(), nn.Linear(8, 8), nn.ReLU()], None),
        ([nn.Conv2d(8, 8, 1), nn.Flatten()], None),
    ],
)
def test_the_final_map_is_the_one_whose_mean_enters_the_head(
    before: list[nn.Module], final: str | None
) -> None:
    assert build(pooled_by(*before)).final_name == final


def test_pooling_in_a_gate_is_not_the_final_one() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1)
            self.average = nn.AvgPool2d(8)
            self.fc = linear()
            self.weigh = nn.Linear(8, 8)
            self.squeeze = nn.AdaptiveAvgPool2d(1)

        def forward(self, images: Tensor) -> Tensor:
            x = self.conv(images)
            x = x * self.weigh(self.squeeze(x).flatten(1)).sigmoid()[:, :, None, None]
            return self.fc(self.average(x).flatten(1))

    network = build(Squeezed())
    assert (network.head_name, network.final_name) == ("fc", "average")
    seen = network.read(torch.rand(2, 1, 8, 8))
    assert seen.final is not None
    torch.testing.assert_close(seen.final.mean((2, 3)), seen.pooled)


@pytest.mark.parametrize(
    ("declared", "reason"), [("gate", "its output is not the logits"), ("unused", "does not run")]
)
def test_a_declared_head_that_is_none_is_refused(declared: str, reason: str) -> None:
    body = Gated(fc=linear(), gate=nn.Linear(8, 8), unused=linear())
    body.head_name = declared
    with pytest.raises(ValueError, match=f"model 'Gated' declares the head '{declared}'.*{reason}"):
        build(body)


def test_a_declared_head_of_another_kind_is_tapped_but_has_no_weights() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sequential(linear(), nn.LogSoftmax(1)))
    body.head_name = "2"
    network = build(body)
    assert network.head is None
    pooled = network.read(torch.rand(2, 1, 8, 8)).pooled
    assert pooled is not None
    assert pooled.shape == (2, 8)


def test_attributes_of_the_same_name_in_others_code_declare_nothing() -> None:
    body = Gated(fc=linear(), gate=nn.Linear(8, 8))
    body.head_name, body.final_name = 3, nn.Identity()
    assert build(body).head_name == "fc"


def test_the_search_leaves_no_trace() -> None:
    class Restless(Body):
        """Counts its passes in evaluation mode too, and draws."""

        def __init__(self) -> None:
            super().__init__(fc=linear(), norm=nn.BatchNorm1d(8))
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            self.passes += 1
            h = self.norm(self.feature(images))
            return self.fc(h + 0 * torch.rand_like(h))

    body = Restless()
    body.fc.eval()
    before = copy.deepcopy(body.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    network = build(body)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.head_name == "fc"
    assert all(torch.equal(before[key], value) for key, value in body.state_dict().items())
    assert [body.training, body.norm.training, body.fc.training] == [True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in body.modules())


def test_the_search_cleans_up_when_the_network_fails() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        find_classifier(body, IMAGES)
    assert body.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in body.modules())


def test_networks_of_nan_still_have_their_head() -> None:
    body = Gated(fc=linear(), gate=nn.Linear(8, 8))
    nn.init.constant_(body.trunk.weight, float("nan"))
    assert build(body).head_name == "fc"


@pytest.mark.parametrize("name", [name for name in model_names() if "/" not in name])
def test_registered_models_are_tapped_where_they_declare(name: str) -> None:
    body = build(name).body
    searched = find_classifier(body, IMAGES)
    assert searched.head == body.head_name
    if name not in ("mixer", "vit_tiny"):  # the mean and the class token are no layers
        assert searched.final == getattr(body, "final_name", None)


@pytest.mark.parametrize(
    ("name", "head", "final"),
    [
        ("resnet18", "fc", "avgpool"),
        ("mobilenet_v3_small", "classifier.3", None),
        ("efficientnet_b0", "classifier.1", "avgpool"),
        ("shufflenet_v2_x0_5", "fc", None),
        ("squeezenet1_1", None, None),
        ("convnext_tiny", "classifier.2", None),
        ("swin_t", "head", "avgpool"),
    ],
)
def test_torchvision_models_are_tapped_at_their_classifier(
    name: str, head: str | None, final: str | None
) -> None:
    network = build_model(
        f"torchvision/{name}",
        num_classes=3,
        in_channels=3,
        image_size=32,
        mean=[0.5] * 3,
        std=[0.2] * 3,
    )
    assert (network.head_name, network.final_name) == (head, final)
