"""One classification header for all networks, trained by the server on mean features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.models.network import Network
from fedkd.randomness import seeded, stream, stream_seed
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import at_least_one
from fedkd.simulations.baselines.fedproto import labelled_prototypes, prototype_rounds
from fedkd.training.loop import Measured, Phase, train_epochs
from fedkd.training.optimizers import Optimizer

HEADER = Phase("the server's header", "lower the method's lr")


@BASELINES.register("fedgh")
class FedGH(Baseline):
    """Replaces the clients' last layers by one that the server trains on their classes' features.

    Discloses to the server which classes a client has.

    Args:
        server_epochs: The server's passes over the clients' mean features in a round.
        lr: Its learning rate, of plain SGD.

    References:
        Yi et al., "FedGH: Heterogeneous Federated Learning with Generalized Global Header", ACM
            Multimedia 2023, https://arxiv.org/abs/2303.13137
    """

    has_student = False

    def __init__(self, *, server_epochs: int = 100, lr: float = 0.01) -> None:
        at_least_one("fedgh", "server_epochs", server_epochs)
        if lr <= 0:
            raise ValueError(f"baseline 'fedgh': lr must be more than 0, got {lr}")
        self.server_epochs = server_epochs
        self.optimizer = Optimizer(
            name="sgd", lr=lr, momentum=0.0, weight_decay=0.0, schedule="constant"
        )

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if networks have features of different widths."""
        seed = context.experiment.seed
        made: list[nn.Linear] = []

        def merge(number: int, answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            if not made:
                classes, width = answers[0]["means"].shape
                with seeded(seed, "header"):
                    made.append(nn.Linear(width, classes))
            header, (features, labels) = made[0], labelled_prototypes(answers)

            def measure(_epoch: int, _step: int, index: Tensor) -> Measured:
                loss = functional.cross_entropy(header(features[index]), labels[index])
                return Measured(loss, len(index))

            train_epochs(
                header,
                len(features),
                measure,
                self.optimizer,
                HEADER,
                epochs=self.server_epochs,
                batch_size=10,
                order=stream(stream_seed(seed, "header", number), "order"),
            )
            return {name: value.clone() for name, value in header.state_dict().items()}

        return prototype_rounds("fedgh", context, on_round, put_header, merge)


@torch.no_grad()
def put_header(network: Network, received: dict[str, Tensor]) -> None:
    """Replace a network's last layer; its own is forgotten."""
    head = network.head
    assert head is not None
    head.weight.copy_(received["weight"])
    if head.bias is not None:
        head.bias.copy_(received["bias"])
