"""Labels from another source than the given ones: what neighbours of an image are called."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.models.network import Network
from fedkd.models.taps import evaluating

CHUNK = 1024
SURE = 0.5
"""Share of the neighbours from which on their majority is relied on."""

SHARE = 40
"""Images for each neighbour that votes: few images have few that are alike."""


def few_neighbours(wanted: int, images: int) -> int:
    """How many neighbours vote in a shard of so many images: three at least."""
    return min(wanted, max(3, images // SHARE))


@dataclass(frozen=True)
class References:
    """What the neighbours of each image are called, beside what it is called.

    Attributes:
        labels: Their majority, (N,).
        certainty: Share of the neighbours that agree on it, (N,).
        confirmed: Images whose label is that of a sure majority, (N,).
        contradicted: Images whose label is another than that of a sure majority, (N,).
    """

    labels: Tensor
    certainty: Tensor
    confirmed: Tensor
    contradicted: Tensor

    @classmethod
    def of(cls, labels: Tensor, certainty: Tensor, given: Tensor) -> References:
        """Reference labels and what they say of the given ones."""
        sure = certainty > SURE
        return cls(labels, certainty, sure & (labels == given), sure & (labels != given))

    @property
    def assent(self) -> float:
        """Share of the given labels that are confirmed."""
        return float(self.confirmed.double().mean())

    def corrected(self, clean: Tensor) -> Tensor:
        """The chance of each label to be clean, where the neighbours are sure as they see it."""
        certainty = self.certainty.to(clean)
        clean = torch.where(self.confirmed, torch.maximum(clean, certainty), clean)
        return torch.where(self.contradicted, torch.minimum(clean, 1 - certainty), clean)


@torch.no_grad()
def embedded(network: Network, images: Tensor, batch_size: int = 256) -> Tensor | None:
    """What enters a network's head, (N, D), in evaluation mode; None if it has no such thing."""
    parts = []
    with evaluating(network):
        for some in images.split(batch_size):
            pooled = network.read(some).pooled
            if pooled is None:
                return None
            parts.append(pooled.float())
    return torch.cat(parts)


def neighbour_labels(
    features: Tensor, labels: Tensor, classes: int, *, neighbours: int = 15
) -> tuple[Tensor, Tensor]:
    """The majority among the given labels of the nearest neighbours, by cosine.

    An image's own label is left out; of classes with as many votes the nearer one wins.

    Args:
        features: Of each image, (N, D).
        labels: Given labels, (N,).
        classes: C.
        neighbours: How many vote; fewer images have fewer.

    Returns:
        The reference label of each image and the share of its neighbours that agree, (N,) both.
        A single image keeps its label.
    """
    count = min(neighbours, len(labels) - 1)
    if count < 1:
        return labels.clone(), torch.ones(len(labels), device=features.device)
    unit = functional.normalize(features.float(), dim=1)
    ranks = torch.arange(count, 0, -1, device=features.device, dtype=torch.float64)
    names, shares = [], []
    for start in range(0, len(unit), CHUNK):
        alike = unit[start : start + CHUNK] @ unit.T
        rows = torch.arange(len(alike), device=alike.device)
        alike[rows, rows + start] = -torch.inf
        voters = functional.one_hot(labels[alike.topk(count, dim=1).indices], classes).double()
        votes = voters.sum(dim=1)
        # Less than one vote together, so that they only part classes with as many.
        near = (voters * ranks[None, :, None]).sum(dim=1) / (count * (count + 1))
        winner = (votes + near).argmax(dim=1)
        names.append(winner)
        shares.append(votes.gather(1, winner[:, None])[:, 0].float() / count)
    return torch.cat(names), torch.cat(shares)
