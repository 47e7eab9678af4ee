"""Which samples make a step, and how many steps that gives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.randomness import stream


def steps_per_epoch(total: int, batch_size: int) -> int:
    """Steps that `batches` gives for `total` samples."""
    full, rest = divmod(total, positive(batch_size))
    return full + (rest > 1 or total == 1 < batch_size)


def batches(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Parts of `order`, one per step.

    A left-over batch of one is dropped, since batch norm cannot train on it, unless it is all
    there is. Batches that hold one sample each because `batch_size` is 1 are none of that.
    """
    total = len(order)
    for index in order.split(positive(batch_size)):
        if len(index) > 1 or batch_size == 1 or total == 1:
            yield index


class Order:
    """Permutations of the samples, one for each epoch: the same for the same seed.

    Any epoch can be the first; one after the other costs one draw each.

    Args:
        total: Number of samples.
        seed: Seed of the order.
    """

    def __init__(self, total: int, seed: int) -> None:
        self._total = total
        self._seed = seed
        self._generator = stream(seed, "order")
        self._drawn = 0

    def epoch(self, number: int) -> Tensor:
        """The permutation of epoch `number`, from 1."""
        if number <= self._drawn:
            self._generator, self._drawn = stream(self._seed, "order"), 0
        while True:
            permutation = torch.randperm(self._total, generator=self._generator)
            self._drawn += 1
            if self._drawn >= number:
                return permutation


def positive(batch_size: int) -> int:
    """The batch size. Raises `ValueError` if it is less than 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    return batch_size


def check_batch_size(network: nn.Module, batch_size: int, key: str, name: str) -> None:
    """Refuse batches of one for a network with batch norm.

    Args:
        network: What is to be trained.
        batch_size: Samples per step.
        key: Where the batch size comes from.
        name: What to call the network.

    Raises:
        ValueError: one line that names the key and the layer.
    """
    if positive(batch_size) == 1 and (layer := batch_norm(network)) is not None:
        raise ValueError(
            f"{key}: {name} has batch norm ({layer}), which cannot train on batches of one; take "
            "at least 2, or a model without batch norm (many have the option norm: group)"
        )


def batch_norm(module: nn.Module) -> str | None:
    """Name of the first layer of batch norm, None without any."""
    layers = (path for path, layer in module.named_modules() if isinstance(layer, _BatchNorm))
    return next(layers, None)
