"""Arguments of the Python API, checked before work starts.

What travels is checked in `knowledge.wire`, what a config says in `config`; this is the third
door. Every message is one line that begins with the argument's name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import TypeVar

from torch import nn

from fedkd.data.images import ImageSet, as_image_set
from fedkd.data.transfer import TransferSet
from fedkd.io.text import nearest
from fedkd.models.checks import check_network, check_training
from fedkd.models.network import Network, shown

Thing = TypeVar("Thing")

# Images on which a network is tried.
_TRIED = 8


def whole(name: str, value: object, least: int | None = None) -> int:
    """A whole number, also one of numpy's. Raises `ValueError`."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if least is None or number >= least:
            return number
    room = "" if least is None else f" of at least {least}"
    raise ValueError(f"{name}: expected a whole number{room}, got {value!r}")


def real(name: str, value: object, least: float) -> float:
    """A finite number of at least `least`. Raises `ValueError`."""
    if isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) < math.inf:
        return float(value)
    raise ValueError(f"{name}: expected a number of at least {least:g}, got {value!r}")


def function(name: str, value: object, what: str) -> None:
    """None or a function of something. Raises `ValueError`."""
    if value is not None and not callable(value):
        raise ValueError(f"{name}: expected a function of {what}, got {shown(value)}")


def truth(name: str, value: object) -> bool:
    """True or False. Raises `ValueError`."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def one_of(name: str, value: object, allowed: Collection[str]) -> str:
    """One of some names. Raises `ValueError` that names the nearest one."""
    if not isinstance(value, str) or value not in allowed:
        hint = nearest(value, list(allowed)) if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{hint}")
    return value


def several(name: str, value: Iterable[Thing], what: str) -> list[Thing]:
    """A list of at least one thing; what gives its things only once is read here, once.

    Args:
        name: Name of the argument.
        value: A list, a tuple, a generator, an `nn.ModuleList`, ...
        what: What is expected, for messages.

    Raises:
        ValueError: it is one thing (a name, a network), it has no order, or it is empty.
    """
    single = isinstance(value, str | bytes | Mapping | set | frozenset | ImageSet) or (
        isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList)
    )
    if single or not isinstance(value, Iterable):
        given = repr(value) if isinstance(value, str) else shown(value)
        hint = f"; write [{given}]" if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected a list of {what}, got {given}{hint}")
    things = list(value)
    if not things:
        raise ValueError(f"{name}: expected a list of {what}, got an empty one")
    return things


def image_set(name: str, value: object, *, labelled: bool = False) -> ImageSet:
    """An image set with at least one image; of another library's data set it is made.

    Args:
        name: Name of the argument.
        value: What was given.
        labelled: Whether it must have labels.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, TransferSet):
        raise ValueError(f"{name}: expected images, got TransferSet; give {name}.images")
    value = as_image_set(name, value)
    if len(value) == 0:
        raise ValueError(f"{name}: has no images")
    if labelled and value.labels is None:
        raise ValueError(f"{name}: needs labels, this image set has none")
    return value


def a_network(name: str, value: object, like: str) -> Network:
    """A `Network`. Raises `ValueError` that says how to make one.

    Args:
        name: Name of the argument.
        value: What was given.
        like: Name of the images to make one for.
    """
    if isinstance(value, Network):
        return value
    given = repr(value) if isinstance(value, str) else shown(value)
    made = "..."
    if isinstance(value, str):
        made = repr(value)
    elif isinstance(value, nn.Module):
        made = "module"
    raise ValueError(
        f"{name}: expected a fedkd.Network, got {given}; make one with "
        f"fedkd.network({made}, {like})"
    )


def fitting(
    name: str, network: Network, images: ImageSet, where: str, *, trained: bool = False
) -> Network:
    """A network that fits the images: it is tried on the first few of them.

    Args:
        name: Name of the argument.
        network: Left as it is.
        images: What it is to see.
        where: Name of the argument that holds the images.
        trained: Whether it is to be trained, so that its training mode is tried too.

    Raises:
        ValueError: it does not fit; see `check_network`.
    """
    tried, classes = images.images[:_TRIED], len(images.classes)
    check_network(network, name, tried, classes, where)
    if trained:
        check_training(network, name, tried, classes, where)
    return network
