"""Finds where to tap a convolutional network that does not name them itself.

One dry forward records which module called which, and the side of the square maps they return.
A stage ends where the resolution is about to fall, so its tap is the last module before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, takewhile

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)


@dataclass
class _Call:
    """One run of a submodule. Sides are None where it takes or gives no square map."""

    name: str
    module: nn.Module
    side_in: int | None
    side_out: int | None = None
    made: object = None
    inner: list[_Call] = field(default_factory=list)


@dataclass(frozen=True)
class _Step:
    """A module whose output the whole network passes through, and the side of that output."""

    name: str
    side: int
    learns: bool
    pools: bool = False


def find_stages(body: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the submodules that end a stage, shallow to deep.

    Blocks with branches inside (residual, inception, ...) are taken whole. Pure pooling at the
    end, and attention blocks without maps, give no stage. Modules that run more than once in
    a forward pass are passed over, since a hook could not tell their outputs apart, and so are
    those that the logits do not depend on (a second head that only counts in training).

    Args:
        body: Any classifier of square images; left in the mode it was in.
        example: Images it can take, (B, channels, h, h), on its device.

    Example:
        >>> cnn = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        ...                     nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...                     nn.Flatten(), nn.Linear(8, 10))
        >>> find_stages(cnn, torch.zeros(2, 1, 8, 8))
        ('1', '4')
    """
    root, logits = _record(body, example)
    runs = Counter(call.name for call in _descendants(root))
    _prune(root, logits)
    stages: list[list[_Step]] = []
    side = 0
    for step in (step for call in root.inner for step in _steps(call)):
        if stages and step.side > side:
            continue  # pooled *up* to the fixed size a classifier wants, as in torchvision's VGG
        if not stages or _falls(side, step.side):
            stages.append([step])
        else:
            stages[-1].append(step)
        side = step.side
    taps = []
    for stage in stages:
        usable = [step.name for step in _before_global_pooling(stage) if runs[step.name] == 1]
        if usable and any(step.learns for step in stage):
            taps.append(usable[-1])
    return tuple(taps)


@contextmanager
def evaluating(body: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each submodule then gets its own mode back."""
    with _restored(body), torch.no_grad():
        body.eval()
        yield


@contextmanager
def training(body: nn.Module) -> Iterator[None]:
    """Training mode with gradients; modes and buffers (batch statistics) are then as before."""
    with _restored(body), torch.enable_grad():
        body.train()
        yield


@contextmanager
def _restored(body: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in body.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in body.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, value in buffers:
            # By value: batch norm writes without counting a version.
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            if name in module._buffers:
                module._buffers[name] = buffer


def noise_like(images: Tensor) -> Tensor:
    """Images of the same shape on the same device, the same on every call; no global draw."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(images.shape, generator=generator)
    return noise.to(images.device, images.dtype)


def _record(body: nn.Module, example: Tensor) -> tuple[_Call, object]:
    """The tree of calls of one forward pass, its root is `body` itself, and what came out."""
    root = _Call("", body, _side(example))
    stack = [root]

    def open_call(
        name: str, module: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]
    ) -> None:
        call = _Call(name, module, _side(next(iter((*inputs, *named.values())), None)))
        stack[-1].inner.append(call)
        stack.append(call)

    def close_call(_module: nn.Module, _inputs: object, output: object) -> None:
        call = stack.pop()
        call.side_out, call.made = _side(output), output

    with ExitStack() as hooks:
        for name, module in body.named_modules():
            if name:
                before = partial(open_call, name)
                opened = module.register_forward_pre_hook(before, with_kwargs=True)
                closed = module.register_forward_hook(close_call)
                hooks.callback(opened.remove)
                hooks.callback(closed.remove)
        with evaluating(body), torch.enable_grad():
            # Not a leaf, or a network could not write into it; with a gradient, frozen or not.
            logits: object = body(example.clone().requires_grad_() + 0)
    return root, logits


def _prune(root: _Call, logits: object) -> None:
    """Leave out the calls that the logits do not depend on, as far as gradients can tell."""
    calls = [call for call in _descendants(root) if _tracked(call.made)]
    if not isinstance(logits, Tensor) or not logits.requires_grad or not calls:
        return
    try:
        made = [call.made for call in calls if isinstance(call.made, Tensor)]
        slopes = torch.autograd.grad(logits.sum(), made, allow_unused=True)
    except RuntimeError:  # someone's own operation without a derivative
        return
    idle = {id(call) for call, slope in zip(calls, slopes, strict=True) if slope is None}
    for call in (root, *_descendants(root)):
        call.inner = [inner for inner in call.inner if id(inner) not in idle]


def _tracked(made: object) -> bool:
    return isinstance(made, Tensor) and made.requires_grad


def _steps(call: _Call) -> Iterator[_Step]:
    """The call itself, or what it runs one after the other if several stages hide in it."""
    if call.side_out is None:
        # E.g. a chain that ends in the logits. One that takes no map has none to show either.
        for inner in call.inner if call.side_in is not None else []:
            yield from _steps(inner)
    elif call.inner and _hides_stages(call):
        for inner in call.inner:
            yield from _steps(inner)
        # Same map as its last child, but the shorter name ("layer2", not "layer2.1").
        yield _Step(call.name, call.side_out, learns=False)
    else:
        # What makes a map of something else (Swin's last permutation) stands for what made that.
        learns = call.side_in is None or any(True for _ in call.module.parameters())
        yield _Step(call.name, call.side_out, learns, isinstance(call.module, _POOLINGS))


def _before_global_pooling(stage: list[_Step]) -> list[_Step]:
    """The steps to choose from: all, but on 1x1 maps none that pooling has made or copied."""
    if stage[0].side > 1:
        return stage
    return list(takewhile(lambda step: not step.pools, stage)) if stage[0].learns else []


def _hides_stages(call: _Call) -> bool:
    """Whether the resolution falls twice inside, or once in a chain without branches."""
    if call.side_in is None or call.side_out is None:
        return False
    limits = range(call.side_out, call.side_in)
    inside = {inner.side_out for inner in _descendants(call) if inner.side_out in limits}
    sides = sorted((side for side in (*inside, call.side_in) if side is not None), reverse=True)
    falls = sum(_falls(before, after) for before, after in pairwise(sides))
    return falls > 1 or (falls == 1 and isinstance(call.module, nn.Sequential))


def _descendants(call: _Call) -> Iterator[_Call]:
    for inner in call.inner:
        yield inner
        yield from _descendants(inner)


def _falls(before: int, after: int) -> bool:
    # Stride 2 takes at least a third (3 -> 2); a 3x3 without padding takes less from 7 on.
    return 3 * after <= 2 * before


def _side(value: object) -> int | None:
    """Side of a square map (B, channels, h, h); None for all else, e.g. (B, h, h, channels)."""
    if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == value.shape[3]:
        return value.shape[3]
    return None
