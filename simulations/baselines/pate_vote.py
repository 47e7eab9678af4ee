"""One round of majority votes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedkd.knowledge.query import Images
from fedkd.randomness import stream
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES, loop
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.local_only import trained_alone
from fedkd.simulations.baselines.traffic import MessageMeter, read
from fedkd.training.evaluation import predict


@BASELINES.register("pate_vote")
class PateVote(Baseline):
    """A student of the class that most clients name for each transfer image, sent once.

    Clients and student take all rounds' epochs at once. The noise is drawn from the run's seed:
    it shows what noise costs, and protects nobody (`release: gnmax` does).

    Args:
        sigma: Standard deviation of Gaussian noise on the counts of votes; 0 is without.

    References:
        Papernot et al., "Scalable Private Learning with PATE", ICLR 2018,
            https://arxiv.org/abs/1802.08908
        Li et al., "Practical One-Shot Federated Learning for Cross-Silo Setting" (FedKT), IJCAI
            2021, https://arxiv.org/abs/2010.01017
    """

    crosses_modalities = True

    def __init__(self, *, sigma: float = 0.0) -> None:
        if sigma < 0:
            raise ValueError(f"baseline 'pate_vote': sigma must not be negative, got {sigma}")
        self.sigma = sigma

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """One round."""
        log = loop.RoundLog(context, on_round)
        meter = MessageMeter(1)
        classes = len(context.data.classes)
        votes = []
        for client, network in trained_alone(context).items():
            images = context.images(Images.TRANSFER, client).images
            names = predict(network, images).argmax(dim=1).numpy()
            names = names.astype(np.uint8 if classes <= 256 else np.uint16)
            reply = meter.answer(meter.ask(client), {"votes": names})
            votes.append(loop.tensors(read(reply))["votes"].long())
        generator = stream(context.experiment.seed, "vote")
        winning = winners(torch.stack(votes), classes, self.sigma, generator)
        student = loop.fresh_student(context)
        hard = loop.log_of(loop.one_hot(winning, classes))
        loop.distill_server(context, student, hard, 1, times=context.experiment.rounds)
        log.end_round([loop.model(student)], meter)
        return log.outcome([loop.model(student)], uses_transfer=True)


def winners(votes: Tensor, classes: int, sigma: float, generator: torch.Generator) -> Tensor:
    """The class with most votes after noise, (M, N) -> (N,); the lowest class wins a draw."""
    counts = torch.nn.functional.one_hot(votes, classes).sum(dim=0).float()
    if sigma > 0:
        counts = counts + sigma * torch.randn(counts.shape, generator=generator)
    return counts.argmax(dim=1)
