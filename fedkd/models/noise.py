"""Noise within a network while it trains: dropout before its head, blocks left out at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models.network import Network
from fedkd.models.resnet import Residual
from fedkd.models.tokens import MixerBlock, TransformerBlock
from fedkd.models.wrn import PreActivation


def add_noise(network: Network, name: str, *, dropout: float = 0.0, survival: float = 1.0) -> None:
    """Make `network` (in place) noisy in training mode; weights and predictions stay as they are.

    Args:
        network: The network.
        name: What it is called in messages.
        dropout: Share of the head's input that is set to zero.
        survival: Chance of the last residual block to be kept for a sample; those before it are
            kept more often, the first nearly always (linear decay). What is kept is scaled by
            one over its chance.

    Raises:
        ValueError: it has no linear head, or no residual blocks.

    References:
        Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016,
            https://arxiv.org/abs/1603.09382
    """
    if dropout > 0:
        head = network.head
        if head is None:
            raise ValueError(f"noise.dropout: {name!r} has no linear head to drop the input of")
        head.register_forward_pre_hook(
            lambda module, inputs: (F.dropout(inputs[0], dropout, module.training),)
        )
    if survival < 1:
        branches = [branch for module in network.body.modules() for branch in _added(module)]
        if not branches:
            raise ValueError(
                f"noise.survival: {name!r} has no residual blocks to leave out; take a ResNet, a "
                "Wide ResNet, mixer or vit_tiny, or survival=1"
            )
        for number, branch in enumerate(branches, start=1):
            kept = 1 - number / len(branches) * (1 - survival)
            branch.register_forward_hook(_sometimes(kept))


def _added(module: nn.Module) -> tuple[nn.Module, ...]:
    """What a residual block adds to its input; nothing of what is none."""
    if isinstance(module, Residual | PreActivation):
        return (module.branch,)
    if isinstance(module, MixerBlock):
        return module.mix_patches, module.mix_channels
    if isinstance(module, TransformerBlock):
        return module.project, module.feed
    return ()


def _sometimes(kept: float) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """A hook that keeps an output for a share of the samples, and scales it."""

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if not module.training:
            return output
        shape = (len(output), *[1] * (output.ndim - 1))
        return output * torch.empty(shape, device=output.device).bernoulli_(kept).div_(kept)

    return hook
