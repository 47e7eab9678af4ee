"""All clients' networks side by side on the server."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.local_only import trained_alone
from fedkd.simulations.baselines.loop import RoundLog
from fedkd.simulations.baselines.traffic import MessageMeter, load, read, weights
from fedkd.training.evaluation import predict


@BASELINES.register("one_shot_ensemble")
class OneShotEnsemble(Baseline):
    """Mean logits of networks that were trained alone; each is sent once.

    Local training takes all rounds' epochs before the one message.

    References:
        Guha et al., "One-Shot Federated Learning", 2019, https://arxiv.org/abs/1902.11175
    """

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """One round."""
        log = RoundLog(context, on_round)
        networks, meter = trained_alone(context), MessageMeter(1)
        for client, network in networks.items():
            load(network, read(meter.answer(meter.ask(client), weights(network))))

        def together(images: Tensor) -> Tensor:
            return torch.stack([predict(network, images) for network in networks.values()]).mean(
                dim=0
            )

        log.end_round([together], meter)
        return log.outcome([together], uses_transfer=False)
