"""Probabilities of the transfer images go up, their sharpened mean comes down."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedkd.knowledge.query import Images
from fedkd.models.network import Network
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES, loop
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import at_least_one
from fedkd.simulations.baselines.traffic import Arrays, MessageMeter
from fedkd.training.evaluation import predict


@BASELINES.register("dsfl")
class DSFL(Baseline):
    """Distils the mean of the clients' probabilities into clients and server, sharpened or not.

    Args:
        aggregation: `era` sharpens the mean (entropy reduction), `sa` leaves it.
        temperature: Of `era`.
        digest_epochs: A client's passes over the transfer set per round; default:
            `teachers.epochs`.

    References:
        Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
            Communication-Efficient Collaborative Training with Non-IID Private Data", IEEE TMC
            2021, https://arxiv.org/abs/2008.06180
    """

    crosses_modalities = True

    def __init__(
        self,
        *,
        aggregation: Literal["era", "sa"] = "era",
        temperature: float = 0.1,
        digest_epochs: int | None = None,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"baseline 'dsfl': temperature must be positive, got {temperature}")
        self.aggregation = aggregation
        self.temperature = temperature
        self.digest_epochs = at_least_one("dsfl", "digest_epochs", digest_epochs)

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        log = loop.RoundLog(context, on_round)
        networks, student = loop.fresh_teachers(context), loop.fresh_student(context)
        shared: Arrays | None = None

        def learn(number: int, client: int, network: Network, received: Arrays) -> None:
            logits = loop.log_of(torch.tensor(received["probabilities"]))
            loop.distill_client(context, network, client, number, logits, epochs=self.digest_epochs)

        def answer(client: int, network: Network) -> Arrays:
            images = context.images(Images.TRANSFER, client).images
            return {"probabilities": predict(network, images).softmax(dim=1).numpy()}

        for number in range(1, context.experiment.rounds + 1):
            meter = MessageMeter(number)
            news = [shared] * len(networks)
            answers = loop.local_round(context, networks, meter, news, learn, answer)
            together = torch.stack([answer["probabilities"] for answer in answers.values()]).mean(
                dim=0
            )
            if self.aggregation == "era":
                together = sharpened(together, self.temperature)
            shared = {"probabilities": together.numpy()}
            loop.distill_server(context, student, loop.log_of(together), number)
            log.end_round([loop.model(student)], meter)
        return log.outcome([loop.model(student)], uses_transfer=True)


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """Entropy reduction: softmax(p / T) of mean probabilities p (N, C) -> (N, C)."""
    return torch.softmax(probabilities / temperature, dim=1)
