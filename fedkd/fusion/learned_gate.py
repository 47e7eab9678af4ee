"""A small network learns whom to believe on which answers."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Self

import torch
from torch import Tensor, nn

from fedkd.functional.options import Count, Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.knowledge.payload import Ensemble
from fedkd.randomness import seeded


def labelled(context: FitContext) -> tuple[list[Ensemble], Tensor]:
    """Batches of labelled images and their classes: the server's own, or a labelled transfer set.

    Raises:
        ValueError: there are neither.
    """
    if context.validation is not None and context.validation_labels is not None:
        return [e for _, e in context.validation_batches()], context.validation_labels
    if context.labels is not None:
        return [e for _, e in context.batches()], context.labels
    raise ValueError(
        "fusion 'learned_gate' learns from labelled images of the server: set data.validation, or "
        "data.transfer.labelled if the transfer set has labels"
    )


@FUSIONS.register("learned_gate")
class LearnedGate(Fusion):
    """Stacking: all teachers' probabilities go in, a weight for each teacher comes out.

    Trained on labelled images of the server, so that the weighted mean of the probabilities gives
    the true class. FENS trains its aggregator in a federation on the clients' images; here no
    client has to do anything.

    Args:
        hidden: Width of its hidden layer.
        steps: Of Adam, each on all labelled images.
        lr: Of Adam.

    References:
        Allouah et al., "Revisiting Ensembling in One-Shot Federated Learning" (FENS), NeurIPS
            2024, https://arxiv.org/abs/2411.07182
    """

    needs_validation = True

    hidden: Count = 32
    steps: Count = 200
    lr: Positive = 0.01
    network: nn.Module | None = field(default=None, init=False)

    def fit(self, context: FitContext) -> Self:
        """Train the gate. Raises `ValueError` without labelled images."""
        batches, labels = labelled(context)
        probabilities = torch.cat(
            [torch.softmax(batch.logits.float(), -1) for batch in batches], dim=1
        )
        prior = torch.cat([batch.weights for batch in batches], dim=1)
        teachers, _, classes = probabilities.shape
        with seeded(context.seed, "gate"):
            network = nn.Sequential(
                nn.Linear(teachers * classes, self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, teachers),
            ).to(probabilities.device)
        labels = labels.to(probabilities.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr, weight_decay=1e-3)
        for _ in range(self.steps):
            weights = _weights(network, probabilities, prior)
            together = torch.einsum("mb,mbc->bc", weights, probabilities)
            loss = -together.gather(1, labels[:, None]).clamp(min=1e-6).log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ready = copy(self)
        ready.network = network.eval().requires_grad_(False)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """The gate's weights on top of those it was given."""
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        even = torch.ones_like(ensemble.weights)
        return ensemble.weighted(_weights(self.known(self.network), probabilities, even))


def _weights(network: nn.Module, probabilities: Tensor, prior: Tensor) -> Tensor:
    """(M, B, C), (M, B) -> (M, B), columns summing to one."""
    flat = probabilities.transpose(0, 1).flatten(1)
    weights = torch.softmax(network.to(flat.device)(flat).T, dim=0) * prior
    result: Tensor = weights / weights.sum(dim=0).clamp(min=1e-30)
    return result
