"""Clients agree on the transfer set and keep their networks."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.knowledge.kinds import Logits
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.models.network import Network
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import at_least_one
from fedkd.simulations.baselines.loop import (
    RoundLog,
    distill_client,
    fresh_teachers,
    local_round,
    model,
)
from fedkd.simulations.baselines.traffic import Arrays, MessageMeter
from fedkd.training.evaluation import predict


@BASELINES.register("fedmd")
class FedMD(Baseline):
    """Each client digests the mean logits of all, then revisits its own images.

    Args:
        digest_epochs: Passes over the transfer set per round.

    References:
        Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019,
            https://arxiv.org/abs/1910.03581
    """

    has_student = False

    def __init__(self, *, digest_epochs: int = 1) -> None:
        at_least_one("fedmd", "digest_epochs", digest_epochs)
        self.digest_epochs = digest_epochs

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        log = RoundLog(context, on_round)
        networks = fresh_teachers(context)
        models = [model(network) for network in networks]
        images = context.data.transfer.images.images
        consensus: Arrays | None = None

        def learn(number: int, client: int, network: Network, received: Arrays) -> None:
            logits = torch.tensor(received["logits"])
            epochs = self.digest_epochs
            distill_client(
                context, network, client, number, logits, epochs=epochs, loss=_Distance()
            )

        def answer(_client: int, network: Network) -> Arrays:
            return {"logits": predict(network, images).numpy()}

        for number in range(1, context.experiment.rounds + 1):
            meter = MessageMeter(number)
            news = [consensus] * len(networks)
            answers = local_round(context, networks, meter, news, learn, answer)
            together = torch.stack([answer["logits"] for answer in answers.values()]).mean(dim=0)
            consensus = {"logits": together.numpy()}
            log.end_round(models, meter)
        return log.outcome(models, uses_transfer=True)


class _Distance(DistillationLoss):
    """Mean absolute difference of logits, the loss of the published code."""

    needs = (Logits(),)

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        return (student[Logits()] - teacher[Logits()]).abs().mean(dim=1)
