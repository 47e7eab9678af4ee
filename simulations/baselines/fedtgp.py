"""Prototypes that the server trains apart from each other, instead of means."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.randomness import seeded, stream, stream_seed
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import at_least_one
from fedkd.simulations.baselines.fedproto import (
    held_to,
    labelled_prototypes,
    mean_prototypes,
    prototype_rounds,
)
from fedkd.training.loop import Measured, Phase, train_epochs
from fedkd.training.optimizers import Optimizer

CENTRES = Phase("the server's prototypes", "lower the method's weight")
OPTIMIZER = Optimizer(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.0, schedule="constant")


@BASELINES.register("fedtgp")
class FedTGP(Baseline):
    """FedProto whose server trains the prototypes to be told apart, with a margin that adapts.

    Discloses to the server which classes a client has.

    Args:
        weight: Of the clients' term.
        threshold: The margin is at most that.
        server_epochs: The server's passes over the clients' prototypes in a round.

    References:
        Zhang et al., "FedTGP: Trainable Global Prototypes with Adaptive-Margin-Enhanced
            Contrastive Learning for Data and Model Heterogeneity in Federated Learning", AAAI
            2024, https://arxiv.org/abs/2401.03230
    """

    has_student = False

    def __init__(
        self, *, weight: float = 1.0, threshold: float = 100.0, server_epochs: int = 100
    ) -> None:
        if weight < 0:
            raise ValueError(f"baseline 'fedtgp': weight must not be negative, got {weight}")
        if threshold < 0:
            raise ValueError(f"baseline 'fedtgp': threshold must not be negative, got {threshold}")
        at_least_one("fedtgp", "server_epochs", server_epochs)
        self.weight, self.threshold, self.server_epochs = weight, threshold, server_epochs

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if networks have features of different widths."""
        seed = context.experiment.seed
        made: list[Centres] = []

        def merge(number: int, answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            if not made:
                with seeded(seed, "prototypes"):
                    made.append(Centres(*answers[0]["means"].shape))
            features, labels = labelled_prototypes(answers)
            middle = mean_prototypes(answers)
            margin = adaptive_margin(middle["means"][middle["known"]], self.threshold)

            def measure(_epoch: int, _step: int, index: Tensor) -> Measured:
                loss = tgp_loss(features[index], made[0](), labels[index], margin)
                return Measured(loss, len(index))

            train_epochs(
                made[0],
                len(features),
                measure,
                OPTIMIZER,
                CENTRES,
                epochs=self.server_epochs,
                batch_size=10,
                order=stream(stream_seed(seed, "prototypes", number), "order"),
            )
            return {"means": made[0]().detach(), "known": middle["known"]}

        return prototype_rounds("fedtgp", context, on_round, held_to(self.weight), merge)


class Centres(nn.Module):
    """A prototype (D,) for each class, from an embedding through two layers."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(classes, width))
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self) -> Tensor:
        """All of them, (C, D)."""
        made: Tensor = self.layers(self.embedding)
        return made


def tgp_loss(features: Tensor, centres: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Cross entropy of minus the distances to all centres, that of the label `margin` longer.

    Args:
        features: The clients' prototypes, (N, D).
        centres: The server's, (C, D).
        labels: Classes of the former, (N,).
        margin: Added to the label's distance.

    Returns:
        A scalar.
    """
    distances = torch.cdist(features, centres)
    own = functional.one_hot(labels, len(centres)).to(distances.dtype)
    return functional.cross_entropy(-(distances + margin * own), labels)


def adaptive_margin(means: Tensor, threshold: float) -> float:
    """The largest distance of a class's mean prototype to its nearest other, at most `threshold`.

    Args:
        means: Of the classes that are known, (K, D).
        threshold: Upper bound.
    """
    if len(means) < 2:
        return 0.0
    distances = torch.cdist(means, means)
    distances.fill_diagonal_(float("inf"))
    return min(float(distances.min(dim=1).values.max()), threshold)
