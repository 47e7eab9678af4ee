"""Weights out of files: ours, a bare `state_dict`, a published teacher's, a foundation model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from fedkd.io.tensors import load_state
from fedkd.models.network import Network

_WRAPPED = ("weights", "state_dict", "model", "net", "network", "model_state_dict", "student")
_SHOWN = 3


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds.

    Attributes:
        path: The file.
        tensors: By name, without DataParallel's `module.`.
        classes: Names in label order, where the file says them.
        model: The architecture's name, where the file says it.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...] | None = None
    model: str | None = None


def read_weights(path: Path) -> WeightsFile:
    """Read a file of weights; code in it is never run.

    Raises:
        ValueError: it is not there, cannot be read or holds no weights; one line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} (nothing is downloaded)")
    facts = path.stat()
    return _read(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, _changed: int, _size: int) -> WeightsFile:
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
    for key, tensor in given.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} is not finite")
    classes, model = content.get("classes"), content.get("model")
    return WeightsFile(
        path,
        given,
        tuple(map(str, classes)) if isinstance(classes, list | tuple) else None,
        model if isinstance(model, str) else None,
    )


def load_weights(
    network: Network,
    file: WeightsFile,
    name: str,
    *,
    whole: bool,
    classes: Sequence[str] = (),
) -> str | None:
    """Put a file's weights into `network`, in place.

    Names may be ours, with or without our preprocessing. Other names are matched by order if all
    shapes agree: the CIFAR networks here hold their tensors in the order of RepDistiller's and
    mdistiller's.

    Args:
        network: Of the architecture.
        file: What was read.
        name: What the network is called in messages.
        whole: Whether the head must fit too; otherwise one for other classes, or none, leaves the
            network's own as it is.
        classes: Names of the classes that the head is for, where they are known: a file that says
            others has another head.

    Returns:
        A remark for the user if names had to be guessed, or if the head is new.

    Raises:
        ValueError: the file does not fit; one line with the first three reasons.
    """
    given = dict(file.tensors)
    target = network if any(key.startswith("body.") for key in given) else network.body
    expected = target.state_dict()
    remark = None
    if not set(_essential(given)) & set(_essential(expected)):
        given = _by_order(given, expected)
        remark = (
            f"{file.path.name}: its names are not ours, so its tensors were matched by their "
            "order; look at the teacher's accuracy"
        )
    head = _head(network, "body." if target is network else "")
    other = _other_head(file, given, expected, head, classes) if head else None
    if other and not whole:
        given = {key: tensor for key, tensor in given.items() if key not in head}
        expected = {key: tensor for key, tensor in expected.items() if key not in head}
        remark = f"{file.path.name}: {other}; {name} starts with a new head"
    found = list(islice(_problems(given, expected), _SHOWN + 1))
    if other and whole:
        found = found or [other]
    if found:
        of = f" (the file is of {file.model})" if file.model else ""
        more = "; ..." if len(found) > _SHOWN else ""
        first = "; ".join(found[:_SHOWN])
        raise ValueError(f"{file.path} does not fit {name}{of}: {first}{more}")
    target.load_state_dict({**target.state_dict(), **given})
    return remark


def _tensors(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    found = (_tensors(content[key]) for key in _WRAPPED if key in content)
    return next((tensors for tensors in found if tensors is not None), None)


def _head(network: Network, prefix: str) -> set[str]:
    """Names of the head's tensors."""
    if network.head is None:
        return set()
    return {f"{prefix}{network.head_name}.{key}" for key in network.head.state_dict()}


def _other_head(
    file: WeightsFile,
    given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    head: set[str],
    classes: Sequence[str],
) -> str | None:
    """In what a file's head is another one than the network's; None if it is not."""
    there = head & set(given)
    if not there:
        return "it has no head"
    weight = next(key for key in head if key.endswith("weight"))
    if weight in given and given[weight].shape[1:] == expected[weight].shape[1:]:
        theirs, ours = len(given[weight]), len(expected[weight])
        if theirs != ours:
            return f"its head {weight} is for {theirs} classes and not {ours}"
    if file.classes is not None and classes and file.classes != tuple(classes):
        return f"its head is for other classes ({', '.join(file.classes[:_SHOWN])}, ...)"
    return None


def _essential(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without batch norm's counters, which old files lack and nothing depends on."""
    return {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}


def _by_order(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names, tensors = list(_essential(expected)), list(_essential(given).values())
    if len(names) != len(tensors):
        return dict(given)
    return dict(zip(names, tensors, strict=True))


def _problems(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    theirs, ours = _essential(given), _essential(expected)
    for key in ours:
        if key not in theirs:
            yield f"it has no {key!r} ({len(theirs)} tensors of {len(ours)})"
        elif theirs[key].shape != ours[key].shape:
            yield f"{key} is {_size(theirs[key])}, expected {_size(ours[key])}"
    for key in theirs:
        if key not in ours:
            yield f"it has {key!r}, which the network has not"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
