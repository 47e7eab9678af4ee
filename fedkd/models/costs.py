"""What a network costs, whatever machine it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedkd.models.network import Network, parameter_count, trainable_count


@dataclass(frozen=True)
class Size:
    """How large a network is.

    Attributes:
        parameters: All of them, also those that are not trained.
        multiply_adds: Of reading one image.
        trainable: Parameters that are trained; None: all of them.
    """

    parameters: int
    multiply_adds: int
    trainable: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Those that are worth telling."""
        return {key: value for key, value in vars(self).items() if value is not None}


def size_of(network: Network, shape: Sequence[int]) -> Size:
    """Parameters, and multiply-adds for an image of a shape (channels, height, width).

    What counts are products of matrices and convolutions, as in the field's tables; norms,
    activations and additions are not in them.
    """
    device, mode = network.mean.device, network.training
    image = torch.zeros(1, *shape, dtype=torch.uint8, device=device)
    counter = FlopCounterMode(display=False)
    network.eval()
    try:
        with torch.no_grad(), _every_product(), counter:
            network(image)
    finally:
        network.train(mode)
    trainable = None if network.base is None else trainable_count(network)
    return Size(parameter_count(network), counter.get_total_flops() // 2, trainable)


@contextmanager
def _every_product() -> Iterator[None]:
    """Attention as single products: fused kernels are operations that nobody counts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
