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

    def run(self, workspace: ExperimentContext, on_round: OnRound) -> Outcome:
        """One round."""
        journal = RoundLog(workspace, on_round)
        images, mail = workspace.data.transfer.images.images, MessageMeter(1)
        told = []
        for client, network in enumerate(trained_alone(workspace)):
            answer = {"probabilities": predict(network, images).softmax(dim=1).numpy()}
            reply = mail.answer(mail.ask(client), answer)
            told.append(tensors(read(reply))["probabilities"])
        student = fresh_student(workspace)
        together = log_of(torch.stack(told).mean(dim=0))
        distill_server(workspace, student, together, 1, times=workspace.experiment.rounds)
        journal.end_round([model(student)], mail)
        return journal.outcome([model(student)], uses_transfer=True)
