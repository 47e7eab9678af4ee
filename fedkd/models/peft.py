"""Parameter-efficient training: a frozen network, and the few numbers beside it that learn.

What a model entry's `peft:` says is a `Peft`; `adapt` acts on it. The rest of a network is frozen:
its weights get no gradient, its batch norms stay in evaluation mode, so its statistics do not move
either, and its state is what learns and the hash of what does not (`Network.state_dict`).

LoRA layers are those of the library `peft`, which is imported here alone, when first used. Its
layer for `nn.MultiheadAttention` adds to the frozen weights and takes away again in each pass,
which moves them by rounding; `AttentionLoRA` stands in for it.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
    https://arxiv.org/abs/2106.09685
    Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023,
    https://arxiv.org/abs/2312.03732 (`rs`)
    Pfeiffer et al., "AdapterFusion", EACL 2021, https://arxiv.org/abs/2005.00247 (`adapter`)
    Ben Zaken, Goldberg, Ravfogel, "BitFit", ACL 2022, https://arxiv.org/abs/2106.10199
    Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm", ICLR 2021,
    https://arxiv.org/abs/2003.00152 (`norm`, here with frozen statistics)
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from fedkd.io.extras import extra
from fedkd.io.text import nearest
from fedkd.models.network import Network
from fedkd.models.taps import evaluating
from fedkd.randomness import seeded

Method = Literal["lora", "adapter", "bitfit", "norm", "head"]
METHODS: tuple[str, ...] = get_args(Method)
PARTS = ("head", "norm", "bias")

# Options that only one method has.
_OF = {
    "r": "lora",
    "alpha": "lora",
    "dropout": "lora",
    "targets": "lora",
    "rs": "lora",
    "bottleneck": "adapter",
}
_GROUPS = ("attention", "linear", "convolutions")

# What transformers call the layers that LoRA goes to, and what follows the attention.
_FUSED = {"queries_keys_values", "qkv", "in_proj", "query_key_value", "Wqkv"}
_SEPARATE = {"q", "v", "q_proj", "v_proj", "to_q", "to_v", "query", "value"}
_FEED = {"feed", "mlp", "ffn", "feed_forward", "mix_channels"}


@dataclass(frozen=True)
class Peft:
    """What learns in a network whose other weights are frozen.

    Attributes:
        method: `lora` adds (alpha / r) B A to weight matrices, `adapter` puts a bottleneck after
            the MLP of each block or after each stage, `bitfit`, `norm` and `head` let biases, the
            affine part of norms or the classifier learn.
        r: `lora`: rank.
        alpha: `lora`: the product is weighted with alpha / r.
        dropout: `lora`: on what enters A.
        targets: `lora`: `attention` (queries and values; a fused layer as a whole), `linear` (all
            linear layers but the classifier), `convolutions` (every 3x3 of the deepest two stages),
            or names of layers. None: `attention`, where there is none `convolutions`.
        rs: `lora`: weighted with alpha / sqrt(r) instead.
        bottleneck: `adapter`: inner width; None: a sixteenth of the width, at least 8.
        train: What learns beside it, of `head`, `norm` and `bias`.
    """

    method: Method
    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    rs: bool = False
    bottleneck: int | None = None
    train: tuple[str, ...] = ("head",)

    def __post_init__(self) -> None:
        for name in ("targets", "train"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.train, str):
            object.__setattr__(self, "train", (self.train,))
        if self.method not in METHODS:
            raise ValueError(
                f"method: expected one of {', '.join(METHODS)}, got {self.method!r}"
                f"{nearest(str(self.method), list(METHODS))}"
            )
        whole = isinstance(self.r, int) and not isinstance(self.r, bool)
        inner = self.bottleneck
        wrong = [
            ("r", not whole or self.r < 1, "a whole number of at least 1"),
            ("alpha", not _is_number(self.alpha) or not self.alpha > 0, "a number above 0"),
            (
                "dropout",
                not _is_number(self.dropout) or not 0 <= self.dropout < 1,
                "a share below 1",
            ),
            ("rs", not isinstance(self.rs, bool), "true or false"),
            (
                "bottleneck",
                inner is not None and (type(inner) is not int or inner < 1),
                "a whole number of at least 1",
            ),
            (
                "targets",
                isinstance(self.targets, str | None) and self.targets not in (None, *_GROUPS),
                f"{', '.join(_GROUPS)} or a list of layers",
            ),
            (
                "train",
                not isinstance(self.train, tuple) or not set(self.train) <= set(PARTS),
                f"some of {', '.join(PARTS)}",
            ),
        ]
        for name, is_wrong, expected in wrong:
            if is_wrong:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, given: object) -> Self:
        """From a config: a method's name, or its options. Raises `ValueError` that names a key."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            given = {"method": given}
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a method or its options, got {given!r}")
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(
                    f"has no key {key!r}{nearest(str(key), known)} (keys: {', '.join(known)})"
                )
        if "method" not in given:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got nothing")
        made = cls(**given)
        for key in given:
            if _OF.get(key, made.method) != made.method:
                raise ValueError(f"{key}: belongs to method {_OF[key]}, not to {made.method}")
        return made

    @property
    def scaling(self) -> float:
        """What the product of B and A is weighted with."""
        return self.alpha / (math.sqrt(self.r) if self.rs else self.r)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def adapt(network: Network, peft: Peft, *, seed: int = 0) -> Network:
    """Freeze a network, in place, but for what `peft` lets learn.

    Before it is trained it gives the same logits, bit by bit.

    Args:
        network: Whose weights are those to keep; not adapted yet.
        peft: What learns.
        seed: Seed of the adapters' first weights; the global generators stay untouched.

    Returns:
        The network.

    Raises:
        ValueError: the network has nothing that this could go to, or is adapted already.
        MissingExtra: the library is not installed.
    """
    if network.base is not None:
        raise ValueError("the network is adapted already; merge it first (fedkd.models.peft)")
    wanted = {*peft.train, *({peft.method} & {"head", "norm"})}
    if peft.method == "bitfit":
        wanted.add("bias")
    if "head" in wanted and network.head_name is None:
        raise ValueError(
            f"{type(network.body).__name__} has no linear classifier that could be found, so none "
            "can learn; set train=[] and take another method than head"
        )
    learns = _parts(network, wanted)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with seeded(seed, "peft", peft.method):
        if peft.method == "lora":
            _add_lora(network, peft)
        elif peft.method == "adapter":
            _add_bottlenecks(network, peft.bottleneck)
    for parameter in learns:
        parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"method {peft.method!r}: {type(network.body).__name__} has none of that")
    network.freeze()
    return network


def merged(network: Network) -> Network:
    """A copy that needs no adapters where they can be added to weights, with all weights its own.

    Bottlenecks are not linear: they stay where they are.
    """
    network = copy.deepcopy(network)
    if network.base is None:
        return network
    for name, layer in list(network.body.named_modules()):
        if is_lora(layer):
            base = layer.get_submodule("base_layer")
            found = _low_rank(name, layer)
            with torch.no_grad():
                found.base.add_(found.delta())
            _put(network.body, name, base)
    network.thaw()
    return network


@dataclass(frozen=True)
class LowRank:
    """The two factors that LoRA adds to a weight matrix.

    Attributes:
        name: Of the layer, in the network's body.
        a: (r, inputs, ...).
        b: (outputs, r, ...).
        base: The frozen weights, (outputs, inputs, ...).
        scaling: What the product is weighted with.
    """

    name: str
    a: nn.Parameter
    b: nn.Parameter
    base: nn.Parameter
    scaling: float

    def delta(self) -> Tensor:
        """What is added to `base`, without gradient."""
        product = self.b.detach().flatten(1) @ self.a.detach().flatten(1)
        return self.scaling * product.view_as(self.base)


def low_rank(network: Network) -> list[LowRank]:
    """All factors in a network, in the order of its layers."""
    layers = network.body.named_modules()
    return [_low_rank(name, layer) for name, layer in layers if is_lora(layer)]


def is_lora(layer: nn.Module) -> bool:
    """Whether a layer is one that LoRA has been added to."""
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def _low_rank(name: str, layer: nn.Module) -> LowRank:
    if isinstance(layer, AttentionLoRA):
        base = layer.base_layer.in_proj_weight
        return LowRank(name, layer.lora_A, layer.lora_B, base, layer.scaling)
    made: Any = layer  # the library's
    a, b = (getattr(layer, key)["default"].weight for key in ("lora_A", "lora_B"))
    return LowRank(name, a, b, made.base_layer.weight, made.scaling["default"])


class AttentionLoRA(nn.Module):
    """`nn.MultiheadAttention` with (alpha / r) B A added to the weights of its input layer.

    Args:
        base_layer: One whose queries, keys and values have one width.
        r: Rank.
        scaling: What the product is weighted with.
    """

    def __init__(self, base_layer: nn.MultiheadAttention, r: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        outputs, inputs = base_layer.in_proj_weight.shape
        self.lora_A = nn.Parameter(base_layer.in_proj_weight.new_empty(r, inputs))
        self.lora_B = nn.Parameter(base_layer.in_proj_weight.new_zeros(outputs, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the library draws its own

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the layer itself."""
        weight = self.base_layer.in_proj_weight + self.scaling * (self.lora_B @ self.lora_A)
        return functional_call(self.base_layer, {"in_proj_weight": weight}, inputs, options)


class Bottleneck(nn.Module):
    """A layer, and after it h + U act(D h) with U = 0 at first.

    Args:
        base_layer: What comes before.
        width: Of h.
        inner: Of D h.
        maps: Whether h is (B, width, height, width) rather than (..., width).
    """

    def __init__(self, base_layer: nn.Module, width: int, inner: int, *, maps: bool) -> None:
        super().__init__()
        layer: Callable[[int, int], nn.Module] = (
            partial(nn.Conv2d, kernel_size=1) if maps else nn.Linear
        )
        self.base_layer = base_layer
        self.down, self.up = layer(width, inner), layer(inner, width)
        self.maps = maps
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """What the layer gives, and what the bottleneck adds."""
        h: Tensor = self.base_layer(*inputs, **options)
        inner = self.down(h)
        inner = functional.relu(inner) if self.maps else functional.gelu(inner)
        out: Tensor = h + self.up(inner)
        return out


def _parts(network: Network, wanted: set[str]) -> list[nn.Parameter]:
    """The network's own parameters that learn."""
    found: list[nn.Parameter] = []
    if "head" in wanted and network.head_name is not None:
        found += network.body.get_submodule(network.head_name).parameters()
    if "norm" in wanted:
        for module in network.body.modules():
            if _is_norm(module):
                found += module.parameters(recurse=False)
    if "bias" in wanted:
        found += [p for name, p in network.body.named_parameters() if name.endswith("bias")]
    return list({id(parameter): parameter for parameter in found}.values())


def _is_norm(module: nn.Module) -> bool:
    known = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, known) or "norm" in type(module).__name__.lower()


def _add_lora(network: Network, peft: Peft) -> None:
    body = network.body
    names = _targets(network, peft.targets)
    layers = {name: body.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if isinstance(layer, nn.MultiheadAttention):
            if layer.in_proj_weight is None:
                raise ValueError(f"targets: {name} has keys or values of another width")
            if peft.dropout:
                raise ValueError(f"dropout: {name} (MultiheadAttention) has no place for it")
            _put(body, name, AttentionLoRA(layer, peft.r, peft.scaling))
    rest = [name for name, layer in layers.items() if not isinstance(layer, nn.MultiheadAttention)]
    if not rest:
        return
    from fedkd.data import vision  # noqa: F401  (torchvision by its door: the library asks for it)

    with extra("peft", "method lora"):
        from peft import LoraConfig, inject_adapter_in_model
    config = LoraConfig(
        r=peft.r,
        lora_alpha=peft.alpha,  # type: ignore[arg-type]  # a float is as good
        lora_dropout=peft.dropout,
        use_rslora=peft.rs,
        target_modules="|".join(map(re.escape, rest)),
    )
    inject_adapter_in_model(config, body)
    del body.peft_config
    body.to(network.mean.device)


def _targets(network: Network, wanted: str | tuple[str, ...] | None) -> list[str]:
    """Names of the layers that LoRA goes to. Raises `ValueError` if there is none."""
    body = network.body
    can = dict(_adaptable(network))
    if isinstance(wanted, tuple):
        found = [name for name in can if any(_ends(name, each) for each in wanted)]
        for each in wanted:
            if not any(_ends(name, each) for name in can):
                known = [name for name, _ in body.named_modules() if name]
                what = (
                    "no linear layer or convolution that could be adapted"
                    if any(_ends(name, each) for name in known)
                    else "no layer"
                )
                raise ValueError(
                    f"targets: {each!r} is {what} of {type(body).__name__}"
                    f"{nearest(str(each), list(can))}"
                )
        return found
    groups = {
        "attention": [n for n, layer in can.items() if _is_attention(n, layer)],
        "linear": [n for n, layer in can.items() if isinstance(layer, nn.Linear)],
        "convolutions": _deep_convolutions(network, can),
    }
    chosen = [wanted] if wanted is not None else ["attention", "convolutions"]
    for group in chosen:
        if groups[group]:
            return groups[group]
    others = [group for group, names in groups.items() if names]
    hint = f"set targets={' or '.join(others)}" if others else "name layers, or take another method"
    raise ValueError(
        f"targets: {type(body).__name__} has no {' and no '.join(map(_described, chosen))}; {hint}"
    )


def _described(group: str) -> str:
    return {
        "attention": "attention layers of known names",
        "linear": "linear layers beside the classifier",
        "convolutions": "3x3 convolutions (of all channels) in its deepest two stages",
    }[group]


def _adaptable(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Layers that LoRA can go to.

    Not the classifier, and none whose weights another layer uses by itself (as those of an
    attention's last layer): what is added to such a layer would be without effect.
    """
    inside = ""
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    names = [n for n, layer in network.body.named_modules() if isinstance(layer, kinds)]
    ran = _outputs(network, names)
    for name, layer in network.body.named_modules():
        if name not in ran:
            continue
        if inside and name.startswith(inside):
            continue
        if isinstance(layer, nn.MultiheadAttention):
            inside = f"{name}."
            yield name, layer
        elif name != network.head_name and getattr(layer, "groups", 1) == 1:
            yield name, layer


def _ends(name: str, with_: str) -> bool:
    return name == with_ or name.endswith(f".{with_}")


def _is_attention(name: str, layer: nn.Module) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return True
    return isinstance(layer, nn.Linear) and name.rpartition(".")[2] in _FUSED | _SEPARATE


def _deep_convolutions(network: Network, can: Mapping[str, nn.Module]) -> list[str]:
    """3x3 convolutions behind the third-last stage."""
    names = [name for name, _ in network.body.named_modules()]
    start = 0
    if len(network.stage_names) > 2:
        before = network.stage_names[-3]
        start = 1 + max(n for n, name in enumerate(names) if f"{name}.".startswith(f"{before}."))
    return [
        name
        for name in names[start:]
        if isinstance(layer := can.get(name), nn.Conv2d) and layer.kernel_size == (3, 3)
    ]


def _add_bottlenecks(network: Network, inner: int | None) -> None:
    body = network.body
    names = [n for n, _ in body.named_modules() if n.rpartition(".")[2] in _FEED]
    names = names or list(network.stage_names)
    if not names:
        raise ValueError(
            f"method 'adapter': {type(body).__name__} has neither blocks with an MLP of a known "
            "name nor stages; take lora with targets=linear"
        )
    for name, made in _outputs(network, names).items():
        layer = body.get_submodule(name)
        if not isinstance(made, Tensor):
            raise ValueError(f"method 'adapter': {name} gives no tensor that could be adapted")
        last = [part for part in layer.modules() if isinstance(part, nn.Linear)][-1:]
        maps = made.ndim == 4 and not any(part.out_features == made.shape[-1] for part in last)
        width = made.shape[1 if maps else -1]
        wrapped = Bottleneck(layer, width, inner or max(width // 16, 8), maps=maps)
        _put(body, name, wrapped.to(network.mean.device))


def _outputs(network: Network, names: list[str]) -> dict[str, object]:
    """What some layers give in a dry pass, by name; those that do not run are not there."""
    found: dict[str, object] = {}

    def look(name: str, _layer: nn.Module, _inputs: object, made: object) -> None:
        found[name] = made

    channels, side = network.channels, network.image_size
    if side is None:
        raise ValueError("the network does not know the size of its images: give it image_size")
    hooks = [
        network.body.get_submodule(name).register_forward_hook(partial(look, name))
        for name in names
    ]
    try:
        with evaluating(network):
            network(torch.zeros(2, channels, side, side, device=network.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name in names if name in found}


def _put(body: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in another one's place."""
    parent, _, attribute = name.rpartition(".")
    setattr(body.get_submodule(parent), attribute, layer)
