"""A frozen network, and the few numbers beside it that learn."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.build import check_model
from fedkd.config import Component, ConfigError
from fedkd.data.images import ImageSet
from fedkd.data.vision import models
from fedkd.models.network import Network, parameter_count, trainable_count
from fedkd.models.peft import METHODS, AttentionLoRA, Peft, adapt, is_lora, low_rank, merged
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import fit
from tests.models.built import built

PIXELS = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator())
MODELS = ["vit_tiny", "resnet8", "cnn_small", "mixer"]


def adapted(model: str, method: str = "lora", **options: object) -> Network:
    more = {"norm": "batch"} if model == "cnn_small" else {}
    if model == "mixer" and method == "lora":
        options = {"targets": "linear", **options}
    return built(model, options={**more, "peft": {"method": method, **options}})


def moved(network: Network) -> Network:
    """With something learnt."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def logits(network: Network) -> Tensor:
    with torch.no_grad():
        return network.eval()(PIXELS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_before_training_and_merging_changes_nothing_after(
    model: str, method: str
) -> None:
    network = adapted(model, method)
    bare = built(model, options={"norm": "batch"} if model == "cnn_small" else {}, seed=0)
    assert torch.equal(logits(network), logits(bare))  # to the last bit
    before = logits(moved(network))
    assert not torch.equal(before, logits(bare))
    whole = merged(network)
    assert torch.allclose(logits(whole), before, atol=1e-5, rtol=0)
    assert not any(is_lora(layer) for layer in whole.modules())
    assert whole.base is None
    if method != "adapter":
        assert whole.state_dict().keys() == bare.state_dict().keys()


def test_counts_are_those_of_the_table() -> None:
    """r 8: 2 L r 2d; bottleneck m: L (2 d m + d + m); ViT-T has 12 blocks of width 192."""
    tiny = {"width": 192, "depth": 12, "heads": 3}
    bare = built("vit_tiny", size=28, options=tiny)

    def count(**options: object) -> int:
        given = {"train": [], **options}
        return trainable_count(adapt(copy.deepcopy(bare), Peft.of(given)))

    assert count(method="lora") == 2 * 12 * 8 * 2 * 192 == 73_728
    assert count(method="adapter") == 12 * (2 * 192 * 12 + 192 + 12)
    assert count(method="lora", train=["head"]) == 73_728 + 193 * 10
    assert count(method="head") == 193 * 10
    assert count(method="norm") == (2 * 12 + 1) * 2 * 192
    biases = sum(p.numel() for n, p in bare.named_parameters() if n.endswith("bias"))
    assert count(method="bitfit") == biases
    resnet = built("resnet20", options={"peft": {"method": "lora", "train": []}})
    wide = [(16, 32)] + 5 * [(32, 32)] + [(32, 64)] + 5 * [(64, 64)]
    assert trainable_count(resnet) == sum(8 * (9 * c_in + c_out) for c_in, c_out in wide)
    assert parameter_count(resnet) > 270_000


def test_attention_of_torchvision_is_adapted_as_a_whole() -> None:
    vit = models.VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(vit.heads[0].weight)
    bare = built(vit, classes=3, channels=3)
    network = adapt(copy.deepcopy(bare), Peft("lora", r=2, train=()))
    assert sum(isinstance(layer, AttentionLoRA) for layer in network.modules()) == 2
    assert trainable_count(network) == 2 * 2 * 2 * 2 * 16
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    frozen = {n: p.clone() for n, p in network.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        assert torch.equal(network.eval()(images), bare.eval()(images))
        moved(network)
        changed = network(images)
        assert not torch.allclose(changed, bare(images), atol=1e-3)
        assert torch.allclose(merged(network)(images), changed, atol=1e-5)
    functional.cross_entropy(network.train()(images), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert all(torch.equal(p, frozen[n]) for n, p in network.named_parameters() if n in frozen)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["resnet8", "vit_tiny"])
def test_what_is_frozen_stays_in_fifty_steps(model: str, method: str) -> None:
    network = adapted(model, method)
    learns = {name for name, p in network.named_parameters() if p.requires_grad}
    state = (*network.named_parameters(), *network.named_buffers())
    before = {name: tensor.clone() for name, tensor in state}
    shard = ImageSet(PIXELS.repeat(17, 1, 1, 1)[:100], torch.arange(100) % 10, tuple("abcdefghij"))
    fit(network, shard, epochs=5, batch_size=10, optimizer=Optimizer("adamw", lr=0.01), seed=1)
    now = dict((*network.named_parameters(), *network.named_buffers()))
    same = {name for name, tensor in now.items() if torch.equal(tensor, before[name])}
    assert same >= set(now) - learns  # running means and counters of batch norm among them
    changed = learns - same
    assert changed == learns


def test_the_state_is_what_learns_and_the_hash_of_the_rest() -> None:
    network = moved(adapted("resnet8"))
    state = network.state_dict()
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    assert set(state) == names | {"mean", "std", "base.sha256"}
    fresh = adapted("resnet8")
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(network))
    assert torch.equal(logits(copy.deepcopy(network)), logits(network))


def test_another_base_is_refused() -> None:
    state = adapted("resnet8").state_dict()
    other = built("resnet8")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    adapt(other, Peft("lora"))
    with pytest.raises(RuntimeError, match="belong to a frozen part with the hash"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the network has no frozen part"):
        built("resnet8").load_state_dict(state)
    with pytest.raises(RuntimeError, match="hash of their frozen part is missing"):
        adapted("resnet8").load_state_dict(built("resnet8").state_dict())
    del state["body.head.bias"]
    with pytest.raises(RuntimeError, match=r"body\.head\.bias is missing"):
        adapted("resnet8").load_state_dict(state)


def test_factors_make_what_merging_adds() -> None:
    network = moved(adapted("cnn_small"))
    found = low_rank(network)
    assert [pair.name for pair in found] == ["stage1.1", "stage2.1"]
    before = [pair.base.clone() for pair in found]
    whole = merged(network)
    for pair, base in zip(found, before):
        weight = whole.body.get_submodule(pair.name).weight
        assert torch.allclose(weight, base + pair.delta(), atol=1e-6)


def test_scaling_is_by_the_rank_or_its_root() -> None:
    assert (Peft("lora").scaling, Peft("lora", r=4, alpha=2.0).scaling) == (1.0, 0.5)
    assert Peft("lora", r=4, alpha=2.0, rs=True).scaling == 1.0
    network = adapted("vit_tiny", r=4, alpha=2.0, rs=True)
    assert {pair.scaling for pair in low_rank(network)} == {1.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lore", r"peft: method: expected one of lora, .*got 'lore'; did you mean 'lora'\?"),
        ({"r": 4}, "peft: method: expected one of lora, adapter, bitfit, norm, head, got nothing"),
        ({"method": "lora", "rank": 4}, "peft: has no key 'rank'"),
        ({"method": "lora", "r": 0}, "peft: r: expected a whole number of at least 1, got 0"),
        ({"method": "lora", "alpha": "x"}, "peft: alpha: expected a number above 0, got 'x'"),
        ({"method": "lora", "dropout": 1.0}, "peft: dropout: expected a share below 1, got 1.0"),
        ({"method": "adapter", "r": 4}, "peft: r: belongs to method lora, not to adapter"),
        ({"method": "lora", "bottleneck": 4}, "peft: bottleneck: belongs to method adapter"),
        ({"method": "adapter", "bottleneck": 0}, "peft: bottleneck: expected a whole number"),
        ({"method": "lora", "targets": "conv"}, "peft: targets: expected attention, linear, conv"),
        ({"method": "lora", "targets": ["stem.9"]}, "peft: targets: 'stem.9' is no layer of"),
        ({"method": "lora", "targets": ["head"]}, "'head' is no linear layer or convolution that"),
        ({"method": "lora", "targets": "attention"}, "no attention layers .* set targets=conv"),
        ({"method": "lora", "train": ["neck"]}, "peft: train: expected some of head, norm, bias"),
        (3, "peft: expected a method or its options, got 3"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built("resnet8", options={"peft": given})


def test_layers_without_effect_are_refused() -> None:
    class Bypass(nn.Module):
        """Uses a layer's weights behind its back, as torchvision's Swin does."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(functional.linear(images.flatten(1), self.qkv.weight))

    with pytest.raises(ValueError, match=r"'qkv' is no linear layer .* that could be adapted"):
        adapt(built(Bypass()), Peft("lora", targets=("qkv",)))
    with pytest.raises(ValueError, match="method 'norm': Bypass has none of that"):
        adapt(built(Bypass()), Peft("norm", train=()))
    with pytest.raises(ValueError, match="neither blocks with an MLP of a known name nor stages"):
        adapt(built("mlp"), Peft("adapter"))
    with pytest.raises(ValueError, match="adapted already"):
        adapt(adapted("resnet8"), Peft("lora"))


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"method lora needs peft: pip install 'fedkd\[peft\]'"):
        adapted("resnet8")
    adapted("resnet8", "adapter")  # ours


def test_random_weights_are_not_frozen() -> None:
    for entry in ("resnet8", "torchvision/resnet18"):
        model = Component(name=entry, peft="lora")
        with pytest.raises(ConfigError, match=r"models\.0\.peft: what is frozen would stay at its"):
            check_model(model, "teachers.models.0")
    wrong = Component(name="resnet8", weights="a.pt", peft={"method": "lora", "r": 0})
    with pytest.raises(ConfigError, match=r"student\.model: model 'resnet8': peft: r: expected"):
        check_model(wrong, "student.model")
