"""Every kind of knowledge about the transfer set that may leave a client, in one file.

A kind is a small frozen value used as the key of its tensor. Options are part of the key, and
`str(kind)` is its name on the wire. Each docstring says what the kind discloses.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

from torch import Tensor

from fedkd.models.network import Network, Outputs


class Reading:
    """One network on one batch, with lazy cached forwards: nobody pays for what nobody asked.

    Args:
        network: The network to read.
        real: uint8 images (B, channels, h, w).
        virtual: View number -> the same images under that virtual view; called at most once
            per view.
    """

    def __init__(
        self, network: Network, real: Tensor, virtual: Callable[[int], Tensor] | None = None
    ) -> None:
        self._network = network
        self._real = real
        self._virtual = virtual
        self._views: dict[int, Outputs] = {}

    @cached_property
    def real(self) -> Outputs:
        """Outputs on the real images."""
        return self._network.read(self._real)

    def view(self, number: int) -> Outputs:
        """Outputs on virtual view `number`."""
        if number not in self._views:
            if self._virtual is None:
                raise RuntimeError("this reading has no virtual views")
            self._views[number] = self._network.read(self._virtual(number))
        return self._views[number]


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of knowledge; subclasses are final."""

    @abstractmethod
    def read(self, reading: Reading) -> Tensor:
        """The tensor of this kind for one batch, first axis = sample."""

    @abstractmethod
    def shape(self, num_classes: int) -> tuple[int, ...]:
        """Shape of one sample's entry: what the server expects before it believes a payload."""

    def __str__(self) -> str:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{name}({options})" if options else name


@dataclass(frozen=True)
class Logits(Kind):
    """Logits of the real image, (B, C).

    Discloses the teacher's full prediction on every transfer image. The relation graphs of the
    real view (inter-sample, inter-class) are functions of it, so they cost no extra bytes.
    """

    def read(self, reading: Reading) -> Tensor:
        """(B, C)."""
        return reading.real.logits

    def shape(self, num_classes: int) -> tuple[int, ...]:
        """(C,)."""
        return (num_classes,)


@dataclass(frozen=True)
class VirtualLogits(Kind):
    """Logits of one virtual view of the image, (B, C).

    Discloses the prediction on an augmented copy that every machine makes for itself from run
    seed, sample index and view. With `Logits` it determines the virtual relation graphs.
    """

    view: int = 0

    def read(self, reading: Reading) -> Tensor:
        """(B, C)."""
        return reading.view(self.view).logits

    def shape(self, num_classes: int) -> tuple[int, ...]:
        """(C,)."""
        return (num_classes,)
