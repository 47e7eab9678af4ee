"""One class per transfer image in both directions, coded as changes and compressed."""

from __future__ import annotations

import zlib

import numpy as np
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


@BASELINES.register("cfd")
class CFD(Baseline):
    """Distils one-bit labels: the clients' into the server, the server's own into the clients.

    Args:
        digest_epochs: A client's passes over the transfer set per round; default:
            `teachers.epochs`.

    References:
        Sattler et al., "CFD: Communication-Efficient Federated Distillation via Soft-Label
            Quantization and Delta Coding", IEEE TNSE 2022, https://arxiv.org/abs/2012.00632
    """

    crosses_modalities = True

    def __init__(self, *, digest_epochs: int | None = None) -> None:
        self.digest_epochs = at_least_one("cfd", "digest_epochs", digest_epochs)

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        log = loop.RoundLog(context, on_round)
        networks, student = loop.fresh_teachers(context), loop.fresh_student(context)
        images = context.data.transfer.images.images
        classes = len(context.data.classes)
        zeros = np.zeros(len(images), np.int64)
        # What each end knows of the last round. Both start from class 0 everywhere.
        sent, received_before = [zeros] * len(networks), [zeros] * len(networks)
        labels, taught = zeros, False

        def learn(number: int, client: int, network: Network, received: Arrays) -> None:
            news = decoded(received["labels"], received_before[client], classes)
            received_before[client] = news
            logits = loop.log_of(loop.one_hot(torch.from_numpy(news), classes))
            loop.distill_client(context, network, client, number, logits, epochs=self.digest_epochs)

        def answer(client: int, network: Network) -> Arrays:
            own = context.images(Images.TRANSFER, client).images
            return {"labels": coded(_winners(network, own), sent[client], classes)}

        for number in range(1, context.experiment.rounds + 1):
            meter = MessageMeter(number)
            # Changes since what each client was sent last: it may have been away for rounds.
            news = [
                {"labels": coded(labels, before, classes)} if taught else None
                for before in received_before
            ]
            answers = loop.local_round(context, networks, meter, news, learn, answer)
            for client, answered in answers.items():
                sent[client] = decoded(answered["labels"].numpy(), sent[client], classes)
            hard = [loop.one_hot(torch.from_numpy(sent[client]), classes) for client in answers]
            loop.distill_server(
                context, student, loop.log_of(torch.stack(hard).mean(dim=0)), number
            )
            labels, taught = _winners(student, images), True
            log.end_round([loop.model(student)], meter)
        return log.outcome([loop.model(student)], uses_transfer=True)


def coded(labels: np.ndarray, before: np.ndarray, classes: int) -> np.ndarray:
    """Classes (N,) as zlib's bytes of their change since `before`, modulo C, uint8 (bytes,)."""
    change = ((labels - before) % classes).astype("<u1" if classes <= 256 else "<u2")
    return np.frombuffer(zlib.compress(change.tobytes(), 9), np.uint8)


def decoded(code: np.ndarray, before: np.ndarray, classes: int) -> np.ndarray:
    """The inverse of `coded`, int64 (N,)."""
    change = np.frombuffer(zlib.decompress(code.tobytes()), "<u1" if classes <= 256 else "<u2")
    return (before + change.astype(np.int64)) % classes


def _winners(network: Network, images: Tensor) -> np.ndarray:
    winners: np.ndarray = predict(network, images).argmax(dim=1).numpy()
    return winners
