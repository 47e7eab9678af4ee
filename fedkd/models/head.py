"""Finds the classifier of a network, and the pooling in front of it, by a dry forward pass.

The classifier is the linear layer whose output *is* the logits: the same memory, unchanged. The
order in which layers were registered, and their names, tell nothing of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.models.taps import evaluating, noise_like

# Rounding: how far a layer's output may be from the exact one, as a share of the largest.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class _Run:
    """One run of a submodule: what entered it and what came out, and in which version."""

    name: str
    module: nn.Module
    given: Tensor
    given_version: int
    made: Tensor
    made_version: int


@dataclass(frozen=True)
class Classifier:
    """Where a network's logits come from.

    Attributes:
        head: Name of the linear layer (or of the declared layer) that gives the logits, or None.
        final: Name of the layer that averages a map into the input of `head`, or None.
        fault: Why the declared head is none, or None.
    """

    head: str | None
    final: str | None
    fault: str | None = None


def first_argument(inputs: tuple[object, ...], named: Mapping[str, object]) -> object:
    """What a module was called with first, by position or by keyword."""
    return inputs[0] if inputs else next(iter(named.values()), None)


def find_classifier(body: nn.Module, example: Tensor, declared: str | None = None) -> Classifier:
    """The layer whose output is the logits, and the pooling whose output enters it.

    A linear layer whose output is scaled, normalised, averaged with another's or cut to fewer
    classes is no classifier: its weights do not give the logits. Neither is a layer that runs
    again later in the pass, since a hook could not tell which run it sees.

    Args:
        body: Any classifier of images; left in the mode it was in.
        example: Images it can take, (B, channels, h, w), on its device.
        declared: Name of the layer that the network or its user declares as the head. It is
            taken if it runs and, where it is linear, gives the logits.

    Example:
        >>> mlp = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
        >>> find_classifier(mlp, torch.zeros(2, 1, 2, 2)).head
        '2'
        >>> find_classifier(nn.Sequential(mlp, nn.LogSoftmax(1)), torch.zeros(2, 1, 2, 2)).head
    """
    runs, logits = _trace(body, noise_like(example), declared)
    last = {run.name: run for run in runs}
    if declared is not None:
        found = last.get(declared)
        if found is None:
            return Classifier(None, None, "it does not run in a forward pass")
        if isinstance(found.module, nn.Linear) and not _gives(found, logits):
            return Classifier(None, None, "it is linear, but its output is not the logits")
    else:
        found = next(
            (
                run
                for run in last.values()
                if isinstance(run.module, nn.Linear) and _gives(run, logits)
            ),
            None,
        )
    if found is None:
        return Classifier(None, None)
    pools = [run.name for run in last.values() if _averages_into(run, found)]
    return Classifier(found.name, pools[-1] if pools else None)


def _trace(body: nn.Module, example: Tensor, declared: str | None) -> tuple[list[_Run], object]:
    """The runs that may matter, in the order in which they ended, and what came out at the end."""
    runs: list[_Run] = []

    def watch(name: str, module: nn.Module) -> None:
        entered: list[tuple[object, int]] = []

        def enter(_module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
            value = first_argument(inputs, named)
            entered.append((value, _version(value)))

        def leave(
            _module: nn.Module, _inputs: object, _named: dict[str, object], made: object
        ) -> None:
            given, version = entered.pop()
            if isinstance(given, Tensor) and isinstance(made, Tensor):
                runs.append(_Run(name, module, given, version, made, _version(made)))

        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)

    with ExitStack() as stack:
        for name, module in body.named_modules():
            watched = (nn.Linear, nn.AdaptiveAvgPool2d, nn.AvgPool2d)
            # A lazy layer becomes a linear one in this very pass.
            if isinstance(module, watched) or name == declared:
                watch(name, module)
        stack.enter_context(evaluating(body))
        logits: object = body(example)
    return runs, logits


def _gives(run: _Run, logits: object) -> bool:
    """Whether the linear layer's output is the logits, and is what its weights make of its input.

    Someone's own subclass, or a hook, may make something else of them.
    """
    if not isinstance(logits, Tensor) or not _same(run.made, run.made_version, logits):
        return False
    assert isinstance(run.module, nn.Linear)
    weight, bias = run.module.weight, run.module.bias
    if run.given_version != _version(run.given) or run.given.shape[-1] != weight.shape[1]:
        return False
    with torch.no_grad():
        linear = functional.linear(run.given.to(weight.dtype), weight, bias).to(run.made.dtype)
    room = _ROUNDING * float(run.made.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(linear, run.made, rtol=0, atol=room, equal_nan=True)


def _averages_into(run: _Run, head: _Run) -> bool:
    """Whether the head's input is the mean over places of the map that enters this pooling."""
    if isinstance(run.module, nn.Linear) or run.given.ndim != 4:
        return False
    if run.made.shape != (*run.given.shape[:2], 1, 1):
        return False
    if not _same(run.made, run.made_version, head.given, head.given_version):
        return False
    mean, made = run.given.mean((2, 3)), run.made.flatten(1)
    room = _ROUNDING * float(made.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(mean, made, rtol=0, atol=room, equal_nan=True)


def _same(made: Tensor, version: int, later: Tensor, later_version: int | None = None) -> bool:
    """Whether `later` is `made` under another shape, and nothing was written into it since."""
    now = _version(later) if later_version is None else later_version
    return (
        made.untyped_storage().data_ptr() == later.untyped_storage().data_ptr()
        and made.storage_offset() == later.storage_offset()
        and _axes(made) == _axes(later)
        and version == now
    )


def _version(value: object) -> int:
    """How often a tensor has been written into; inference tensors do not count it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    """Lengths and strides of the axes that have more than one place."""
    return [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
