"""A small network learns whom to believe on which answers."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor, nn

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.fusion.validation_accuracy import labelled
from fedkd.knowledge.payload import Ensemble
from fedkd.randomness import seeded


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

    def __init__(self, *, hidden: int = 32, steps: int = 200, lr: float = 0.01) -> None:
        if hidden < 1 or steps < 1 or lr <= 0:
            raise ValueError("fusion 'learned_gate': hidden, steps and lr must be positive")
        self.hidden = hidden
        self.steps = steps
        self.lr = lr
        self.network: nn.Module | None = None

    def fitted(self, evidence: FitContext) -> Self:
        """Train the gate. Raises `ValueError` without labelled images."""
        batches, labels = labelled(evidence, "learned_gate")
        probabilities = torch.cat(
            [torch.softmax(batch.logits.float(), -1) for batch in batches], dim=1
        )
        prior = torch.cat([batch.weights for batch in batches], dim=1)
        teachers, _, classes = probabilities.shape
        with seeded(evidence.seed, "gate"):
            network = nn.Sequential(
                nn.Linear(teachers * classes, self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, teachers),
            )
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
        if self.network is None:
            raise RuntimeError("fusion 'learned_gate' has to be fitted: use fit_rules")
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        even = torch.ones_like(ensemble.weights)
        return ensemble.weighted(_weights(self.network, probabilities, even))


def _weights(network: nn.Module, probabilities: Tensor, prior: Tensor) -> Tensor:
    """(M, B, C), (M, B) -> (M, B), columns summing to one."""
    flat = probabilities.transpose(0, 1).flatten(1)
    weights = torch.softmax(network(flat).T, dim=0) * prior
    result: Tensor = weights / weights.sum(dim=0).clamp(min=1e-30)
    return result
