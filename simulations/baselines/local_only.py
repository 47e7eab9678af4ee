"""Nobody talks to anybody: what a client has without the federation."""

from __future__ import annotations

from fedkd.models.network import Network
from fedkd.rounds import ExperimentContext
from simulations.baselines import BASELINES
from simulations.baselines.base import Baseline, OnRound, Outcome
from simulations.baselines.loop import RoundLog, fresh_teachers, model, train


@BASELINES.register("local_only")
class LocalOnly(Baseline):
    """Each client trains its own network alone."""

    has_student = False

    def run(self, workspace: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        journal = RoundLog(workspace, on_round)
        networks = fresh_teachers(workspace)
        models = [model(network) for network in networks]
        for number in range(1, workspace.experiment.rounds + 1):
            for client, network in enumerate(networks):
                train(workspace, network, client, number)
            journal.end_round(models)
        return journal.outcome(models, uses_transfer=False)


def trained_alone(workspace: ExperimentContext) -> list[Network]:
    """The networks that `local_only` ends with: where one-shot methods begin."""
    networks = fresh_teachers(workspace)
    for client, network in enumerate(networks):
        for number in range(1, workspace.experiment.rounds + 1):
            train(workspace, network, client, number)
    return networks
