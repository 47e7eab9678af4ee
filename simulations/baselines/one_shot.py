"""One round of distillation from clients that were trained alone."""

from __future__ import annotations

import torch

from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES, loop
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.local_only import trained_alone
from fedkd.simulations.baselines.traffic import MessageMeter, read
from fedkd.training.evaluation import predict


@BASELINES.register("one_shot")
class OneShot(Baseline):
    """A student of the clients' mean probabilities on the transfer set, sent once.

    Clients and student take all rounds' epochs at once.

    References:
        Guha et al., "One-Shot Federated Learning", 2019, https://arxiv.org/abs/1902.11175
    """

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """One round."""
        log = loop.RoundLog(context, on_round)
        images, meter = context.data.transfer.images.images, MessageMeter(1)
        probabilities = []
        for client, network in trained_alone(context).items():
            answer = {"probabilities": predict(network, images).softmax(dim=1).numpy()}
            reply = meter.answer(meter.ask(client), answer)
            probabilities.append(loop.tensors(read(reply))["probabilities"])
        student = loop.fresh_student(context)
        together = loop.log_of(torch.stack(probabilities).mean(dim=0))
        loop.distill_server(context, student, together, 1, times=context.experiment.rounds)
        log.end_round([loop.model(student)], meter)
        return log.outcome([loop.model(student)], uses_transfer=True)
