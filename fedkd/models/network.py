"""What every network in fedkd looks like from outside: pixels in, `Outputs` out.

`Network` wraps any image classifier (ours, torchvision's, a user's) without changing it. It
scales and normalises 8-bit pixels itself, so a checkpoint carries its preprocessing, and it
taps stage features and the pooled feature with forward hooks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

# Where the hash of what is frozen stands in a state.
_BASE = "base.sha256"

# How far floats may leave [0, 1] by rounding.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Outputs:
    """Everything a loss may read from one forward pass.

    Attributes:
        logits: (B, C).
        stages: Feature maps, shallow to deep, each (B, channels, h, w).
        pooled: Input of the classification head, (B, D); None if the network has no head.
        final: The map whose mean over places is `pooled` (of a ViT: its patches), (B, D, h, w);
            None if there is none. Not always the last stage: a norm, or a wider convolution,
            may come in between.
    """

    logits: Tensor
    stages: tuple[Tensor, ...] = field(default=())
    pooled: Tensor | None = None
    final: Tensor | None = None


class Network(nn.Module):
    """An image classifier with its preprocessing and its taps.

    Args:
        body: Module mapping normalised float images (B, channels, h, w) to logits (B, C).
        mean: Per-channel mean of the pixels in [0, 1].
        std: Per-channel standard deviation of the pixels in [0, 1].
        stages: Names of the submodules of `body` whose outputs are the stage features; None
            takes `body.stages` if the module declares it, else no stages.
        head: Name of the classification layer whose input is the pooled feature; None takes
            `body.head_name` if declared, else there is none. `build_model` finds it by a dry
            forward pass.
        final: Name of the submodule whose *input* is the map that is averaged into the pooled
            feature; None takes `body.final_name` if declared, else there is no such map.
        image_size: Side of the images that the network takes; None if it is not known.
        resize: Side to which they are resized for the body (bicubic); None leaves them as they are.
        grey: Whether the images have one channel, which the body sees as three.

    Attributes:
        base: SHA-256 of what is frozen, where only a part learns (`fedkd.models.peft`): that part
            is then its state. None: all of it learns.

    Raises:
        ValueError: a named submodule does not exist, `body` is no module or a `Network` itself,
            or `mean` and `std` are no pixel statistics.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        stages: Sequence[str] | None = None,
        head: str | None = None,
        final: str | None = None,
        image_size: int | None = None,
        resize: int | None = None,
        grey: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(body, nn.Module):
            raise ValueError(f"body: expected a torch.nn.Module, got {shown(body)}")
        if isinstance(body, Network):
            raise ValueError("body: is a Network already, images would be normalised twice")
        self.body = body
        means, stds = _numbers("mean", mean), _numbers("std", std)
        if len(means) != len(stds):
            raise ValueError(
                f"mean and std: expected one value per channel of both, got {len(means)} and "
                f"{len(stds)}"
            )
        if min(stds) <= 0:
            raise ValueError(f"std: expected positive values, got {stds}")
        self.register_buffer("mean", torch.tensor(means, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(stds, dtype=torch.float32).view(1, -1, 1, 1))
        self.image_size = image_size
        self.resize = resize
        #: Of the images.
        self.channels = 1 if grey else len(means)
        #: Which of the classes at hand the logits are about, (C,) True or False; None: all.
        self.knows: tuple[bool, ...] | None = None
        modules = dict(body.named_modules())
        self.stage_names = declared_stages(body) or () if stages is None else tuple(stages)
        self.head_name = head or declared(body, "head_name")
        self.final_name = final or declared(body, "final_name")
        for name in (*self.stage_names, self.head_name, self.final_name):
            if name is not None and name not in modules:
                raise ValueError(
                    f"{type(body).__name__} has no submodule {name!r} to tap "
                    f"(it has: {', '.join(key for key in modules if key)})"
                )
        self._compiled: Callable[[Tensor], Outputs] | None = None
        self.base: str | None = None

    def freeze(self) -> None:
        """From now on only what requires a gradient learns; statistics of norms stay as they are.

        What is frozen may not be changed any more: its hash stands for it.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.frozen().items()):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
        self.base = digest.hexdigest()
        self.train(self.training)

    def thaw(self) -> None:
        """All of it learns again, and all of it is its state."""
        self.base = None
        self.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; of a frozen part with statistics it stays evaluation."""
        super().train(mode)
        if self.base is not None:
            for module in self.modules():
                if isinstance(module, _NormBase) and module.track_running_stats:
                    module.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """All weights and buffers; where a part is frozen, what learns and the hash of the rest."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.base is None:
            return state
        own = {name: state[name] for name in self._learning()}
        digest = torch.frombuffer(bytearray.fromhex(self.base), dtype=torch.uint8)
        return {**own, _BASE: digest.clone()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over a state. Raises `RuntimeError` if it is not one of such a network."""
        if self.base is None:
            if _BASE in state_dict:
                raise RuntimeError("these are adapters, the network has no frozen part")
            return super().load_state_dict(state_dict, strict, assign)
        given = dict(state_dict)
        found = given.pop(_BASE, None)
        if not isinstance(found, Tensor):
            raise RuntimeError("these are no adapters: the hash of their frozen part is missing")
        if (theirs := bytes(found.cpu().tolist()).hex()) != self.base:
            raise RuntimeError(
                f"these adapters belong to a frozen part with the hash {theirs[:16]}, this network "
                f"has {self.base[:16]}: give it the weights that they were trained on"
            )
        wanted = set(self._learning())
        if strict and wanted != set(given):
            name = min(wanted ^ set(given))
            raise RuntimeError(f"{name} {'is missing' if name in wanted else 'is unknown'}")
        return super().load_state_dict(given, strict=False, assign=assign)

    def _learning(self) -> list[str]:
        """Names of what learns, and of the preprocessing, which depends on the images."""
        names = [name for name, p in self.named_parameters() if p.requires_grad]
        return ["mean", "std", *names]

    def frozen(self) -> dict[str, Tensor]:
        """What does not learn, by name."""
        own = set(self._learning())
        state = (*self.named_parameters(), *self.named_buffers())
        return {name: tensor for name, tensor in state if name not in own}

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, channels, h, w) or floats in [0, 1] -> normalised floats.

        Raises:
            ValueError: the images have other axes or channels, another type, or floats outside
                [0, 1]; those are usually normalised or not divided by 255.
        """
        channels = self.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images: this network takes {channels}-channel images (B, {channels}, h, w), "
                f"got {tuple(images.shape)}"
            )
        scaled = images.to(self.mean.dtype)
        if images.dtype == torch.uint8:
            scaled = scaled.div(255)
        else:
            _check_floats(images)
        # One channel becomes three here, if there are three statistics.
        normalised = (scaled - self.mean) / self.std
        if self.resize is None:
            return normalised
        return functional.interpolate(normalised, self.resize, mode="bicubic", antialias=True)

    def extra_repr(self) -> str:
        """What is done to the images beside normalising them."""
        return "" if self.resize is None else f"resize={self.resize}"

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of uint8 images, or of floats in [0, 1]."""
        logits: Tensor = self.body(self.normalise(images))
        return logits

    @property
    def head(self) -> nn.Linear | None:
        """The linear classifier; None if the network ends in something else."""
        if self.head_name is None:
            return None
        head = self.body.get_submodule(self.head_name)
        return head if isinstance(head, nn.Linear) else None

    def compile_reading(self, **options: Any) -> None:
        """Compile `read`: the first batches of every shape and mode take long, later ones less.

        The whole of it, taps included: hooks set on a module that has been compiled before are
        not seen. A copy of this network must be compiled for itself.

        Args:
            **options: Options of `torch.compile`.
        """
        import torch._functorch.config as functorch

        # Each term's own gradient is asked for before the step, on the same graph.
        functorch.donated_buffer = False
        self._compiled = torch.compile(self._read, **options)

    def read(self, images: Tensor) -> Outputs:
        """Logits, stage features, pooled feature and its map, of one forward pass."""
        return self._read(images) if self._compiled is None else self._compiled(images)

    def _read(self, images: Tensor) -> Outputs:
        taken: dict[str, Tensor] = {}

        def output(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda _module, _inputs, value: taken.__setitem__(name, value)

        def entry(name: str) -> Callable[..., None]:
            return lambda _module, inputs, named: taken.__setitem__(
                f"into {name}", inputs[0] if inputs else next(iter(named.values()))
            )

        handles = [
            self.body.get_submodule(name).register_forward_hook(output(name))
            for name in self.stage_names
        ]
        handles += [
            self.body.get_submodule(name).register_forward_pre_hook(entry(name), with_kwargs=True)
            for name in (self.head_name, self.final_name)
            if name is not None
        ]
        try:
            logits = self(images)
        finally:
            for handle in handles:
                handle.remove()
        for name in self.stage_names:
            if name not in taken:
                raise ValueError(f"stage {name!r} of {type(self.body).__name__} does not run")
        pooled = taken.get(f"into {self.head_name}")
        return Outputs(
            logits,
            tuple(taken[name] for name in self.stage_names),
            None if pooled is None else pooled.flatten(1),
            taken.get(f"into {self.final_name}"),
        )


def declared(body: nn.Module, attribute: str) -> str | None:
    """The submodule's name that `body` declares; in others' code it may be something else."""
    name = getattr(body, attribute, None)
    return name if isinstance(name, str) else None


def declared_stages(body: nn.Module) -> tuple[str, ...] | None:
    """`body.stages` if it is a list of names: in others' code it may be a list of modules."""
    stages = getattr(body, "stages", None)
    if isinstance(stages, (list, tuple)) and all(isinstance(name, str) for name in stages):
        return tuple(stages)
    return None


def shown(value: object) -> str:
    """What something is, for messages: a class is not taken for its instance."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    try:
        numbers = [float(v) for v in (values.flatten() if isinstance(values, Tensor) else values)]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}: expected one finite number per channel, got {values!r}")
    return numbers


def _check_floats(images: Tensor) -> None:
    """Raise `ValueError` unless these are floats in [0, 1], but for rounding.

    fedkd's own loops feed bytes, so no accelerator waits for this.
    """
    if not images.is_floating_point():
        raise ValueError(f"images: expected uint8 or floats in [0, 1], got {images.dtype}")
    if torch.compiler.is_compiling() or images.numel() == 0:
        return
    low, high = images.detach().aminmax()
    try:
        lowest, highest = float(low), float(high)
    except RuntimeError:
        return  # under a transform of torch.func, or without data, there is nothing to look at
    if not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):
        raise ValueError(
            f"images: expected uint8 or floats in [0, 1], got floats from {lowest:.4g} to "
            f"{highest:.4g}; the network scales and normalises by itself: hand over uint8, "
            "or divide by 255 and do not normalise"
        )


def parameter_count(network: nn.Module) -> int:
    """Number of parameters, frozen ones too."""
    return sum(p.numel() for p in network.parameters())


def trainable_count(network: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
