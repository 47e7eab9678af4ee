"""FedAvg, then distillation of the clients' ensemble on the server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedkd.models.network import Network
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import at_least_one, average, refuse_other_networks
from fedkd.simulations.baselines.loop import distill_server, fresh_student, groups
from fedkd.simulations.baselines.traffic import load, read
from fedkd.training.evaluation import predict_many


@BASELINES.register("feddf")
class FedDF(Baseline):
    """Averages weights, then matches the softmax of the clients' mean logits on the transfer set.

    Only the server needs the transfer set: clients send their weights.

    Args:
        epochs: Local epochs; default: `teachers.epochs`.

    References:
        Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning",
            NeurIPS 2020, https://arxiv.org/abs/2006.07242
    """

    def __init__(self, *, epochs: int | None = None) -> None:
        self.epochs = at_least_one("feddf", "epochs", epochs)

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if clients have other networks than the student's."""
        refuse_other_networks(context, "feddf")
        images = context.data.transfer.images.images
        teachers: list[Network] = []

        def refine(student: Network, replies: Sequence[Message], number: int) -> None:
            logits, waiting = [], list(replies)
            for group in groups(context, number):
                some, waiting = waiting[: len(group)], waiting[len(group) :]
                teachers.extend(fresh_student(context) for _ in some[len(teachers) :])
                for teacher, reply in zip(teachers, some, strict=False):
                    load(teacher, read(reply))
                logits.append(predict_many(teachers[: len(some)], images, together=len(some) > 1))
            distill_server(context, student, torch.cat(logits).mean(dim=0), number)

        return average(context, on_round, FlowerFedAvg(), epochs=self.epochs, refine=refine)
