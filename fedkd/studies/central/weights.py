"""Weights out of files: ours, a bare `state_dict`, or one of the published benchmarks' teachers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedkd.models.network import Network
from fedkd.runs.directory import load_state

_WRAPPED = ("weights", "state_dict", "model", "net", "network", "model_state_dict")


def load_weights(network: Network, path: Path, name: str) -> str | None:
    """Load a checkpoint into `network` in place; code in the file is never run.

    Names may be ours, with or without our preprocessing, or carry DataParallel's `module.`.
    Other names are matched by order if all shapes agree: the CIFAR networks here hold their
    tensors in the order of RepDistiller's and mdistiller's.

    Returns:
        A remark for the user if names had to be guessed.

    Raises:
        ValueError: the file cannot be read or does not fit; one line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = load_state(path)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        advice = "expected tensors, as torch.save(model.state_dict()) writes"
        raise ValueError(f"{first}; {advice}") from None
    given = _tensors(content)
    if given is None:
        raise ValueError(f"{path} holds no weights (a mapping of names to tensors)")
    if all(key.startswith("module.") for key in given):
        given = {key.removeprefix("module."): tensor for key, tensor in given.items()}
    target: nn.Module = network
    if not any(key.startswith("body.") for key in given):
        target = network.body
    expected = target.state_dict()
    remark = None
    if not set(_essential(given)) & set(_essential(expected)):
        given = _by_order(given, expected)
        remark = (
            f"{path.name}: its names are not ours, so its tensors were matched by their order; "
            "look at the teacher's accuracy"
        )
    _compare(given, expected, f"{path} does not fit {name}")
    target.load_state_dict({**expected, **given})
    return remark


def _tensors(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    found = (_tensors(content[key]) for key in _WRAPPED if key in content)
    return next((tensors for tensors in found if tensors is not None), None)


def _essential(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without batch norm's counters, which old files lack and nothing depends on."""
    return {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}


def _by_order(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names, tensors = list(_essential(expected)), list(_essential(given).values())
    if len(names) != len(tensors):
        return dict(given)
    return dict(zip(names, tensors, strict=True))


def _compare(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    theirs, ours = _essential(given), _essential(expected)
    for key in ours:
        if key not in theirs:
            raise ValueError(f"{what}: it has no {key!r} ({len(theirs)} tensors of {len(ours)})")
        if theirs[key].shape != ours[key].shape:
            raise ValueError(f"{what}: {key} is {_size(theirs[key])}, expected {_size(ours[key])}")
    if odd := [key for key in theirs if key not in ours]:
        raise ValueError(f"{what}: it has {odd[0]!r}, which the network has not")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
