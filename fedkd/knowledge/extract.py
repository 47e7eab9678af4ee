"""Trained network + images -> the kinds that were asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedkd.knowledge.kinds import Kind, Reading
from fedkd.models.network import Network


@torch.no_grad()
def extract(
    network: Network,
    images: Tensor,
    kinds: Iterable[Kind],
    *,
    views: Callable[[int], Tensor] | None = None,
    batch_size: int = 256,
) -> dict[Kind, Tensor]:
    """Read `kinds` from a network in evaluation mode, batch by batch.

    Args:
        network: Left in the mode (train or eval) it was in.
        images: uint8 (N, channels, h, w).
        kinds: What to read; each costs the forwards it needs and no more.
        views: View number -> all images under that virtual view, uint8 (N, channels, h, w).
        batch_size: Images per forward.

    Returns:
        Kind -> tensor (N, ...) on the CPU.
    """
    kinds = tuple(kinds)
    device = network.mean.device
    mode = network.training
    network.eval()
    parts: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    try:
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            reading = Reading(network, images[rows].to(device), _rows_of(views, rows, device))
            for kind in kinds:
                parts[kind].append(kind.read(reading).float().cpu())
    finally:
        network.train(mode)
    return {kind: torch.cat(tensors) for kind, tensors in parts.items()}


def _rows_of(
    views: Callable[[int], Tensor] | None, rows: slice, device: torch.device
) -> Callable[[int], Tensor] | None:
    if views is None:
        return None
    return lambda number: views(number)[rows].to(device)
