"""Trained network + images -> the kinds that were asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedkd.knowledge.kinds import DataStatistic, Kind, Reading, TeacherStatistic
from fedkd.models.network import Network
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
