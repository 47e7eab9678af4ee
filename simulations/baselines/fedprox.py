"""FedAvg whose clients are held to the server's weights."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedProx as FlowerFedProx

from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import at_least_one, average, refuse_other_networks


@BASELINES.register("fedprox")
class FedProx(Baseline):
    """FedAvg with a proximal term mu/2 |w - w_server|^2 in the clients' loss.

    Args:
        mu: Its weight; 0 is FedAvg.
        epochs: Local epochs; default: `teachers.epochs`.

    References:
        Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
            https://arxiv.org/abs/1812.06127
    """

    def __init__(self, *, mu: float = 0.1, epochs: int | None = None) -> None:
        if mu < 0:
            raise ValueError(f"baseline 'fedprox': mu must not be negative, got {mu}")
        self.mu = mu
        self.epochs = at_least_one("fedprox", "epochs", epochs)

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if clients have other networks than the student's."""
        refuse_other_networks(context, "fedprox")
        strategy = FlowerFedProx(proximal_mu=self.mu) if self.mu > 0 else FlowerFedAvg()
        return average(context, on_round, strategy, epochs=self.epochs, mu=self.mu)
