"""Trained network + images -> the kinds that were asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fedkd.knowledge.kinds import DataStatistic, Kind, Reading, TeacherStatistic
from fedkd.models.network import Network
from fedkd.models.stacked import (
    Stack,
    Unstackable,
    architecture,
    check_stack,
    close,
    in_stacks,
)
from fedkd.models.taps import evaluating

# Images per forward: caches of a CPU hold few, an accelerator waits for its host with few.
BATCH_SIZES, LARGE_BATCH = {"cpu": 256}, 2048


class Unreadable(ValueError):
    """A network has nothing of a kind.

    Attributes:
        kind: The kind that was asked for.
    """

    def __init__(self, kind: Kind, reason: object) -> None:
        super().__init__(f"{kind} cannot be read from this network: {reason}")
        self.kind = kind


@torch.no_grad()
def extract(
    network: Network,
    images: Tensor,
    kinds: Iterable[Kind],
    *,
    views: Callable[[int], Tensor] | None = None,
    own: Tensor | None = None,
    batch_size: int | None = None,
) -> dict[Kind, Tensor]:
    """Read `kinds` from a network in evaluation mode, batch by batch.

    Args:
        network: Each of its modules is left in the mode (train or eval) it was in.
        images: uint8 (N, channels, h, w).
        kinds: What to read; each costs the forwards it needs and no more.
        views: View number -> all images under that virtual view, uint8 (N, channels, h, w).
        own: The client's private images, for kinds that are computed from them.
        batch_size: Images per forward; None: 256 on a CPU, 2,048 on an accelerator.

    Returns:
        Kind -> tensor on the CPU, (N, ...) unless it is a fact about the network.

    Raises:
        Unreadable: the network has no such thing; the message names the kind.
        ValueError: the images do not fit the network, or `own` is missing.
    """
    kinds = tuple(kinds)
    device = network.mean.device
    batch_size = batch_size or BATCH_SIZES.get(device.type, LARGE_BATCH)
    parts: dict[Kind, list[Tensor]] = {
        kind: [] for kind in kinds if kind.per_sample and not isinstance(kind, DataStatistic)
    }
    with evaluating(network):
        for start in range(0, len(images), batch_size) if parts else ():
            rows = slice(start, start + batch_size)
            reading = Reading(network, images[rows].to(device), _rows_of(views, rows, device))
            for kind, taken in parts.items():
                taken.append(_named(kind, kind.read, reading).float().cpu())
        found = {kind: torch.cat(taken) for kind, taken in parts.items()}
        for kind in kinds:
            if isinstance(kind, DataStatistic):
                if own is None:
                    raise ValueError(
                        f"{kind} is computed from a client's own images; there are none"
                    )
                found[kind] = kind.compare(images, own)
            if isinstance(kind, TeacherStatistic):
                found[kind] = _named(kind, kind.state, network, images, None).float().cpu()
    return found


def extract_many(
    networks: Sequence[Network],
    images: Tensor,
    kinds: Iterable[Kind],
    *,
    views: Callable[[int], Tensor] | None = None,
    owns: Sequence[Tensor] | None = None,
    batch_size: int = 256,
    together: bool | None = None,
) -> list[dict[Kind, Tensor]]:
    """Read `kinds` from many networks about the same images, as `extract` does it.

    Args:
        networks: Each is left as it is.
        images: As in `extract`.
        kinds: Likewise.
        views: Likewise; asked once per view and batch.
        owns: The private images of each client, for kinds that are computed from them.
        batch_size: Images per forward of one network.
        together: Whether networks of one architecture are read in the same operations, which rounds
            sums otherwise; None: on accelerators. Those that cannot are read one after the other.

    Returns:
        For each network what `extract` gives.

    Raises:
        Unreadable: a network has no such thing; the message names the kind.
        ValueError: the images do not fit a network, or `owns` is missing.
    """
    kinds = tuple(kinds)
    batched = tuple(k for k in kinds if k.per_sample and not isinstance(k, DataStatistic))
    rest = tuple(kind for kind in kinds if kind not in batched)

    def alone(number: int, kinds: Sequence[Kind] = batched) -> dict[Kind, Tensor]:
        own = None if owns is None else owns[number]
        return extract(networks[number], images, kinds, views=views, own=own, batch_size=batch_size)

    found = in_stacks(
        networks,
        [architecture(each, together) if batched and len(images) else None for each in networks],
        lambda group: _extract_together(
            [networks[number] for number in group], images, batched, views, batch_size
        ),
        alone,
    )
    whole = [{**tensors, **alone(number, rest)} for number, tensors in enumerate(found)]
    return [{kind: tensors[kind] for kind in kinds} for tensors in whole]


@torch.no_grad()
def _extract_together(
    networks: Sequence[Network],
    images: Tensor,
    kinds: Sequence[Kind],
    views: Callable[[int], Tensor] | None,
    batch_size: int,
) -> list[dict[Kind, Tensor]]:
    device = networks[0].mean.device
    stack = Stack(networks, training=False)
    check_stack(stack, networks, [images[:2]] * len(networks))
    parts: list[list[Tensor]] = []
    used: list[int] = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        real, shown = images[rows].to(device), _Remembered(_rows_of(views, rows, device))
        for number in used:  # nothing may be drawn while all are read
            shown(number)

        def read(
            network: Network, real: Tensor = real, shown: _Remembered = shown
        ) -> tuple[Tensor, ...]:
            reading = Reading(network, real, shown)
            return tuple(_named(kind, kind.read, reading) for kind in kinds)

        if not start:
            with evaluating(networks[0]):
                alone = read(networks[0])
            used = shown.numbers
        together = stack.apply(read)
        if not start:
            for kind, one, several in zip(kinds, alone, together, strict=True):
                if one.shape != several.shape[1:] or not close(several[0], one):
                    raise Unstackable(f"{kind} of a network is another one where all are read")
        parts.append([tensor.float().cpu() for tensor in together])
    whole = [torch.cat(taken, dim=1) for taken in zip(*parts, strict=True)]
    return [
        {kind: tensor[row].clone() for kind, tensor in zip(kinds, whole, strict=True)}
        for row in range(len(networks))
    ]


class _Remembered:
    """Virtual views of a batch, each made once."""

    def __init__(self, make: Callable[[int], Tensor] | None) -> None:
        self._make = make
        self._made: dict[int, Tensor] = {}

    @property
    def numbers(self) -> list[int]:
        """Which have been asked for."""
        return list(self._made)

    def __call__(self, number: int) -> Tensor:
        """View `number`."""
        if number not in self._made:
            if self._make is None:
                raise RuntimeError("this reading has no virtual views")
            self._made[number] = self._make(number)
        return self._made[number]


def shapes(
    network: Network, kinds: Iterable[Kind], image: tuple[int, int, int]
) -> dict[Kind, tuple[int, ...]]:
    """Shape of each kind's entry per sample (of a fact: of the whole) from this network.

    Args:
        network: With any weights.
        kinds: What would be read.
        image: (channels, h, w).

    Raises:
        Unreadable: the network has no such thing; the message names the kind.
    """
    black = torch.zeros(2, *image, dtype=torch.uint8)
    found = extract(network, black, kinds, views=lambda _number: black, own=black)
    return {
        kind: tuple(tensor.shape[1:] if kind.per_sample else tensor.shape)
        for kind, tensor in found.items()
    }


def _named(kind: Kind, read: Callable[..., Tensor], *arguments: object) -> Tensor:
    try:
        return read(*arguments)
    except ValueError as error:
        raise Unreadable(kind, error) from None


def _rows_of(
    views: Callable[[int], Tensor] | None, rows: slice, device: torch.device
) -> Callable[[int], Tensor] | None:
    if views is None:
        return None
    return lambda number: views(number)[rows].to(device)
