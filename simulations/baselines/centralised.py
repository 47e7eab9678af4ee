"""The ceiling: no federation at all."""

from __future__ import annotations

import torch

from fedkd.data.images import ImageSet
from fedkd.randomness import stream_seed
from fedkd.rounds import ExperimentContext
from fedkd.training.supervised import fit
from simulations.baselines import BASELINES
from simulations.baselines.base import Baseline, OnRound, Outcome
from simulations.baselines.loop import RoundLog, fresh_student, model


@BASELINES.register("centralised")
class Centralised(Baseline):
    """The student's network on all private images in one place, for as many epochs as a client."""

    def run(self, workspace: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        journal = RoundLog(workspace, on_round)
        experiment, data = workspace.experiment, workspace.data
        shards = [data.shard(client) for client in range(experiment.clients)]
        labels = torch.cat([shard.labels for shard in shards if shard.labels is not None])
        images = ImageSet(torch.cat([shard.images for shard in shards]), labels, data.classes)
        student = fresh_student(workspace)
        for number in range(1, experiment.rounds + 1):
            seed = stream_seed(experiment.seed, "teach", "all", number)
            fit(student, images, experiment.teachers, seed=seed)
            journal.end_round([model(student)])
        return journal.outcome([model(student)], uses_transfer=False)
