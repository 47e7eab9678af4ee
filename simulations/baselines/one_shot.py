"""One round of distillation from clients that were trained alone."""

from __future__ import annotations

import torch

from fedkd.rounds import ExperimentContext
from fedkd.training.evaluation import predict
from simulations.baselines import BASELINES
from simulations.baselines.base import Baseline, OnRound, Outcome
from simulations.baselines.local_only import trained_alone
from simulations.baselines.loop import (
    RoundLog,
    distill_server,
    fresh_student,
    log_of,
    model,
    tensors,
)
from simulations.baselines.traffic import MessageMeter, read


@BASELINES.register("one_shot")
class OneShot(Baseline):
    """A student of the clients' mean probabilities on the transfer set, sent once.

    Clients and student take all rounds' epochs at once.

    References:
        Guha et al., "One-Shot Federated Learning", 2019, https://arxiv.org/abs/1902.11175
    """

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """One round."""
        log = RoundLog(context, on_round)
        images, meter = context.data.transfer.images.images, MessageMeter(1)
        probabilities = []
        for client, network in enumerate(trained_alone(context)):
            answer = {"probabilities": predict(network, images).softmax(dim=1).numpy()}
            reply = meter.answer(meter.ask(client), answer)
            probabilities.append(tensors(read(reply))["probabilities"])
        student = fresh_student(context)
        together = log_of(torch.stack(probabilities).mean(dim=0))
        distill_server(context, student, together, 1, times=context.experiment.rounds)
        log.end_round([model(student)], meter)
        return log.outcome([model(student)], uses_transfer=True)
