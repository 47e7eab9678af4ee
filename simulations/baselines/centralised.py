"""The ceiling: no federation at all."""

from __future__ import annotations

from fedkd.build import local_training
from fedkd.randomness import stream_seed
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.loop import RoundLog, fresh_student, model
from fedkd.training.supervised import fit


@BASELINES.register("centralised")
class Centralised(Baseline):
    """The student's network on all private images in one place, for as many epochs as a client."""

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        log = RoundLog(context, on_round)
        experiment, data = context.experiment, context.data
        images, options = data.pooled(), local_training(experiment.teachers)
        student = fresh_student(context)
        for number in range(1, experiment.rounds + 1):
            seed = stream_seed(experiment.seed, "teach", "all", number)
            fit(student, images, **options, seed=seed)
            log.end_round([model(student)])
        return log.outcome([model(student)], uses_transfer=False)
