"""Nobody talks to anybody: what a client has without the federation."""

from __future__ import annotations

from fedkd.models.network import Network
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.loop import RoundLog, fresh_teachers, groups, model, train


@BASELINES.register("local_only")
class LocalOnly(Baseline):
    """Each client trains its own network alone."""

    has_student = False

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        log = RoundLog(context, on_round)
        networks = fresh_teachers(context)
        models = [model(network) for network in networks]
        for number in range(1, context.experiment.rounds + 1):
            for group in groups(context, number):
                train(context, {client: networks[client] for client in group}, number)
            log.end_round(models)
        return log.outcome(models, uses_transfer=False)


def trained_alone(context: ExperimentContext) -> dict[int, Network]:
    """The networks of `local_only` that are trained in the end: where one-shot methods begin."""
    networks, trained = fresh_teachers(context), set()
    for number in range(1, context.experiment.rounds + 1):
        for group in groups(context, number):
            train(context, {client: networks[client] for client in group}, number)
            trained.update(group)
    return {client: networks[client] for client in sorted(trained)}
