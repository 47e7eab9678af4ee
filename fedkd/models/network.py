"""What every network in fedkd looks like from outside: pixels in, `Outputs` out.

`Network` wraps any image classifier (ours, torchvision's, a user's) without changing it. It
scales and normalises 8-bit pixels itself, so a checkpoint carries its preprocessing, and it
taps stage features and the pooled feature with forward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
            `body.head_name` if declared, else the last `nn.Linear` of `body`.
        final: Name of the submodule whose *input* is the map that is averaged into the pooled
            feature; None takes `body.final_name` if declared, else there is no such map.

    Raises:
        ValueError: a named submodule does not exist.
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
    ) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        modules = dict(body.named_modules())
        self.stage_names = tuple(getattr(body, "stages", ()) if stages is None else stages)
        self.head_name = head or getattr(body, "head_name", None) or _last_linear(body)
        self.final_name: str | None = final or getattr(body, "final_name", None)
        for name in (*self.stage_names, self.head_name, self.final_name):
            if name is not None and name not in modules:
                raise ValueError(
                    f"{type(body).__name__} has no submodule {name!r} to tap "
                    f"(it has: {', '.join(key for key in modules if key)})"
                )
        self._compiled: Callable[[Tensor], Outputs] | None = None

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, channels, h, w) or floats in [0, 1] -> normalised floats."""
        scaled = images.to(self.mean.dtype).div(255) if images.dtype == torch.uint8 else images
        return (scaled - self.mean) / self.std

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

        def entry(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, inputs: taken.__setitem__(f"into {name}", inputs[0])

        handles = [
            self.body.get_submodule(name).register_forward_hook(output(name))
            for name in self.stage_names
        ]
        handles += [
            self.body.get_submodule(name).register_forward_pre_hook(entry(name))
            for name in (self.head_name, self.final_name)
            if name is not None
        ]
        try:
            logits = self(images)
        finally:
            for handle in handles:
                handle.remove()
        pooled = taken.get(f"into {self.head_name}")
        return Outputs(
            logits,
            tuple(taken[name] for name in self.stage_names),
            None if pooled is None else pooled.flatten(1),
            taken.get(f"into {self.final_name}"),
        )


def _last_linear(body: nn.Module) -> str | None:
    names = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
