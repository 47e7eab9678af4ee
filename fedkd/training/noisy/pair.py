"""Two networks that answer as one, and the one that knows something before it sees a label."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fedkd.models.network import Network
from fedkd.models.taps import evaluating
from fedkd.randomness import seeded

SURE = 0.99
"""Agreement above which no network counts more: its logarithm of the odds would have no end."""


class Both(nn.Module):
    """The weighted sum of the logits of two bodies.

    Attributes:
        shares: Weight of each, (2,): part of its weights, since it is measured in training.
    """

    shares: Tensor

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("shares", torch.ones(2))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images."""
        logits: Tensor = self.shares[0] * self.first(images) + self.shares[1] * self.second(images)
        return logits


def paired(first: Network, second: Network) -> Network:
    """Both as one network, which gives logits and no features; it shares their weights."""
    return Network(
        Both(first.body, second.body),
        mean=first.mean.flatten().tolist(),
        std=first.std.flatten().tolist(),
        stages=(),
        image_size=first.image_size,
    ).to(first.mean.device)


def both_of(pair: Network) -> Both | None:
    """The two bodies of a network that `paired` made; None of another."""
    return pair.body if isinstance(pair.body, Both) else None


def halves(pair: Network) -> tuple[Network, Network]:
    """The two networks of one that `paired` made; they share its weights."""
    both = both_of(pair)
    assert both is not None
    mean, std = pair.mean.flatten().tolist(), pair.std.flatten().tolist()
    made = []
    for body in (both.first, both.second):
        network = Network(body, mean=mean, std=std, stages=(), image_size=pair.image_size)
        made.append(network.to(pair.mean.device))
    return made[0], made[1]


def with_new_head(network: Network, seed: int, name: str) -> Network:
    """The network, in place, with the head that ACD-U trains on a pretrained encoder.

    Linear, batch norm, ReLU, dropout 0.25, linear, batch norm.

    Raises:
        ValueError: it has no linear head to put another one in place of.
    """
    head = network.head
    if head is None or network.head_name is None:
        raise ValueError(f"{name!r} has no linear head, in whose place a new one could learn")
    width, classes = head.in_features, head.out_features
    with seeded(seed, "init", "head"):
        new = nn.Sequential(
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(width, classes),
            nn.BatchNorm1d(classes),
        ).to(network.mean.device)
    parent, _, last = network.head_name.rpartition(".")
    setattr(network.body.get_submodule(parent), last, new)
    return network


def moves_on_its_own(network: nn.Module) -> bool:
    """Whether training mode answers otherwise than evaluation, which is what starts unlearning."""
    return any(
        isinstance(layer, _BatchNorm) or (isinstance(layer, _DropoutNd) and layer.p > 0)
        for layer in network.modules()
    )


def check_unlearning(network: Network, name: str) -> None:
    """Refuse a network that equals its frozen copy in training mode too.

    Raises:
        ValueError: it has neither batch norm nor dropout.
    """
    if not moves_on_its_own(network):
        raise ValueError(
            f"{name!r} has neither batch norm nor dropout: it equals its frozen copy in training "
            "mode too, so unlearning has no gradient to start with; take one that has (for many, "
            "the option norm: batch), or method: divide"
        )


def snapshot_of(network: Network) -> Network:
    """A frozen copy in evaluation mode."""
    copied = copy.deepcopy(network).eval()
    return copied.requires_grad_(requires_grad=False)


@contextmanager
def in_mode(network: Network, mode: str) -> Iterator[None]:
    """Read a network in evaluation mode, or as it is."""
    if mode == "eval":
        with evaluating(network):
            yield
    else:
        yield


def agreement_shares(first: float, second: float) -> tuple[float, float]:
    """Weights of two voters by how often each is right: logarithms of the odds, summing to two.

    Args:
        first: Share of clean labels that the first network gives.
        second: Likewise.
    """
    odds = [max(min(each, SURE), 1 - SURE) for each in (first, second)]
    logs = [max(float(torch.logit(torch.tensor(each))), 0.0) for each in odds]
    total = sum(logs)
    return (1.0, 1.0) if total == 0 else (2 * logs[0] / total, 2 * logs[1] / total)
