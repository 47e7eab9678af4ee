"""The classifier is the linear layer whose output is the logits; nothing is guessed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models.build import model_names
from fedkd.models.head import find_classifier
from fedkd.models.network import Network
from tests.models.built import built

IMAGES = torch.zeros(2, 1, 8, 8)


class Made(nn.Module):
    """What a function makes of a 64 -> 8 feature, with layers registered in any order."""

    def __init__(self, answer: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Linear(64, 8)
        self.answer = answer
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> Any:
        return self.answer(self, self.trunk(images.flatten(1)).relu())


def gated(**layers: nn.Module) -> Made:
    given = {"fc": linear(), "gate": nn.Linear(8, 8)} | layers
    return Made(lambda m, h: m.fc(h * m.gate(h).sigmoid()), **given)


def auxiliary(m: Any, h: Tensor) -> Any:
    """Inception: a second head that only counts in training, registered and run last."""
    out, aux = m.fc(h), m.aux(h)
    return (out, aux) if m.training else out


def two_heads(m: Any, h: Tensor) -> Any:
    """DeiT: both heads averaged."""
    one, other = m.fc(h), m.distilled(h)
    return (one, other) if m.training else (one + other) / 2


def added(m: Any, h: Tensor) -> Tensor:
    """LoRA: the low-rank part starts at zero, so only by value both are the same."""
    nn.init.zeros_(m.up.weight)
    return m.fc(h) + m.up(m.down(h))


def again(m: Any, h: Tensor) -> Tensor:
    """The head runs once more afterwards, for something else."""
    logits = m.fc(h)
    m.fc(h.neg())
    return logits


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(input), F.normalize(self.weight))


def linear() -> nn.Linear:
    return nn.Linear(8, 4)


def pooled_by(*before: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), *before, linear()
    )


def flat(*after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *after)


attention = nn.MultiheadAttention(8, 2, batch_first=True)
with_head: dict[str, tuple[nn.Module, str]] = {
    "gated": (gated(), "fc"),
    "auxiliary": (Made(auxiliary, fc=linear(), aux=linear()), "fc"),
    # One layer runs several times; the last time gives the logits.
    "recurrent": (Made(lambda m, h: m.fc(m.fc(h).relu()), fc=nn.Linear(8, 8)), "fc"),
    "keyword": (Made(lambda m, h: m.fc(input=h), fc=linear()), "fc"),
    # Attention pooling, whose projection is registered last.
    "attended": (
        Made(lambda m, h: m.fc(m.pool(*[h[:, None]] * 3)[0][:, 0]), fc=linear(), pool=attention),
        "fc",
    ),
    "lazy": (gated(fc=nn.LazyLinear(4), gate=nn.LazyLinear(8)), "fc"),
    "weight norm": (gated(fc=nn.utils.parametrizations.weight_norm(linear())), "fc"),
    "nested": (flat(nn.Linear(64, 8), nn.Sequential(nn.Dropout(), linear())), "2.1"),
    "identity": (flat(nn.Linear(64, 4, bias=False), nn.Identity()), "1"),
    "dropout": (flat(nn.Linear(64, 4), nn.Dropout(0.3)), "1"),
}
without_head = {
    "two heads": Made(two_heads, fc=linear(), distilled=linear()),
    "scaled": Made(lambda m, h: m.fc(h) / 2, fc=linear()),
    "scaled in place": Made(lambda m, h: m.fc(h).div_(2), fc=linear()),
    "added": Made(added, fc=linear(), down=nn.Linear(8, 2), up=nn.Linear(2, 4)),
    "cut": Made(lambda m, h: m.fc(h)[:, :4], fc=nn.Linear(8, 6)),
    "again": Made(again, fc=linear()),
    # The head sees all tokens, and one of them is the answer.
    "tokens": Made(lambda m, h: m.fc(torch.stack([h, -h], 1))[:, 0], fc=linear()),
    "cosine": gated(fc=Cosine(8, 4)),
    "log softmax": flat(nn.Linear(64, 4), nn.LogSoftmax(1)),
    "relu": flat(nn.Linear(64, 4), nn.ReLU(inplace=True)),
    "pooled": nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "convolution": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(1, 4, 2), nn.Flatten()),
}


def build(body: nn.Module | str, classes: int = 4) -> Network:
    return built(body, classes, seed=1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", with_head)
def test_the_head_is_the_layer_whose_output_is_the_logits(name: str, training: bool) -> None:
    body, head = with_head[name]
    body.train(training)
    network = build(body, 8 if name == "recurrent" else 4)
    assert network.head_name == head
    assert network.body.training is training
    network.eval()
    seen = network.read(torch.rand(3, 1, 8, 8))
    assert seen.pooled is not None
    assert network.head is not None
    torch.testing.assert_close(network.head(seen.pooled), seen.logits)


@pytest.mark.parametrize("body", without_head.values(), ids=without_head)
def test_no_head_rather_than_a_wrong_one(body: nn.Module) -> None:
    network = build(body)
    assert network.head_name is None
    assert network.head is None
    assert network.eval().read(torch.rand(3, 1, 8, 8)).pooled is None


def test_old_weight_norm_is_a_head_too() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(linear())
    assert build(gated(fc=layer)).head_name == "fc"


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
    body = gated(unused=linear())
    body.head_name = declared
    with pytest.raises(ValueError, match=f"model 'Made' declares the head '{declared}'.*{reason}"):
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
    body = gated()
    body.head_name, body.final_name = 3, nn.Identity()
    assert build(body).head_name == "fc"


def test_the_search_leaves_no_trace() -> None:
    def restless(m: Any, h: Tensor) -> Tensor:
        """Counts its passes in evaluation mode too, and draws."""
        m.passes += 1
        return m.fc(m.norm(h) + 0 * torch.rand_like(h))

    body = Made(restless, fc=linear(), norm=nn.BatchNorm1d(8))
    body.register_buffer("passes", torch.zeros(()))
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
    body = gated()
    nn.init.constant_(body.trunk.weight, float("nan"))
    assert build(body).head_name == "fc"


@pytest.mark.parametrize("name", [name for name in model_names() if "/" not in name])
def test_registered_models_are_tapped_where_they_declare(name: str) -> None:
    public = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    body = built(name, 4, seed=1, public=public).body
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
    network = built(f"torchvision/{name}", 3, 3, 32)
    assert (network.head_name, network.final_name) == (head, final)
