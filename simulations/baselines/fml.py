"""A private and a shared network at each client, which learn from each other; one is averaged."""

from __future__ import annotations

from functools import partial
from typing import Unpack

from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import Tensor, nn
from torch.nn import functional

from fedkd.build import local_training
from fedkd.data.images import ImageSet
from fedkd.losses.kd import kd_loss
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.rounds import ExperimentContext, computing
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import quiet
from fedkd.simulations.baselines.loop import RoundLog, asked, fresh_student, fresh_teachers, model
from fedkd.simulations.baselines.traffic import MessageMeter, load, read, weights
from fedkd.training.loop import Measured, Phase
from fedkd.training.supervised import Passes, fit_by

PAIR = Phase("a client's two networks", "lower teachers.optimizer.lr", "teachers.batch_size")


@BASELINES.register("fml")
class FML(Baseline):
    """Averages a copy of the student at each client, which learns with the client's own network.

    Args:
        weight: Of what each of the two learns from the other, beside its cross entropy: the paper's
            (1 - alpha) / alpha, with its alpha = beta = 1/2.

    References:
        Shen et al., "Federated Mutual Learning", 2020, https://arxiv.org/abs/2006.16765
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        if weight < 0:
            raise ValueError(f"baseline 'fml': weight must not be negative, got {weight}")
        self.weight = weight

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        log = RoundLog(context, on_round)
        experiment, data = context.experiment, context.data
        student, networks = fresh_student(context), fresh_teachers(context)
        copy = fresh_student(context).to(networks[0].mean.device)
        strategy = FlowerFedAvg()
        for number in range(1, experiment.rounds + 1):
            meter, replies = MessageMeter(number), []
            for client in asked(context, number):
                request = meter.ask(client, weights(student))
                load(copy, read(request))
                shard = data.shard(client)
                with computing(experiment.resources, experiment.resources.client_cpus):
                    learn_together(
                        networks[client],
                        copy,
                        shard,
                        weight=self.weight,
                        seed=stream_seed(experiment.seed, "teach", client, number),
                        **local_training(experiment.teachers),
                    )
                replies.append(meter.answer(request, weights(copy), len(shard)))
            with quiet():
                arrays, _ = strategy.aggregate_train(number, replies)
            assert arrays is not None
            load(student, arrays)
            log.end_round([model(student)], meter)
        return log.outcome([model(student)], uses_transfer=False)


def mutual_loss(
    logits: Tensor, others: Tensor, labels: Tensor, *, weight: float, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy, and `weight` times KL(other || own) to the other's answers, a scalar."""
    own = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return own + weight * kd_loss(logits, others.detach(), temperature=1.0).mean()


def learn_together(
    private: Network,
    shared: Network,
    shard: ImageSet,
    *,
    weight: float,
    seed: int,
    label_smoothing: float,
    **options: Unpack[Passes],
) -> None:
    """Train both networks (in place) on the same batches, each by `mutual_loss`."""
    learn = partial(mutual_loss, weight=weight, label_smoothing=label_smoothing)

    def measure(images: Tensor, labels: Tensor) -> Measured:
        one, other = private(images), shared(images)
        return Measured(learn(one, other, labels) + learn(other, one, labels), len(labels))

    both, device = nn.ModuleList([private, shared]), private.mean.device
    fit_by(both, shard, measure, device=device, seed=seed, phase=PAIR, **options)
