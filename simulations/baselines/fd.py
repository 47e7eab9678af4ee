"""Mean logits per class instead of a transfer set."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedkd.build import local_training
from fedkd.data.images import ImageSet
from fedkd.losses.kd import kd_loss
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.rounds import ExperimentContext, computing
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.loop import RoundLog, asked, fresh_teachers, model, tensors
from fedkd.simulations.baselines.traffic import MessageMeter, read
from fedkd.training.evaluation import predict
from fedkd.training.supervised import TEACHER, Pull, fit


@BASELINES.register("fd")
class FD(Baseline):
    """Holds each client to the other clients' mean logits of the class of each private image.

    Discloses to the server which classes a client has.

    Args:
        gamma: Weight of that term in the local loss.

    References:
        Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation
            and Augmentation under Non-IID Private Data", 2018, https://arxiv.org/abs/1811.11479
    """

    has_student = False

    def __init__(self, *, gamma: float = 1.0) -> None:
        if gamma < 0:
            raise ValueError(f"baseline 'fd': gamma must not be negative, got {gamma}")
        self.gamma = gamma

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds."""
        log = RoundLog(context, on_round)
        experiment, data = context.experiment, context.data
        networks = fresh_teachers(context)
        models = [model(network) for network in networks]
        classes = len(data.classes)
        all_means = torch.zeros(len(networks), classes, classes)
        known = torch.zeros(len(networks), classes, dtype=torch.bool)
        for number in range(1, experiment.rounds + 1):
            meter, answers = MessageMeter(number), {}
            for client in asked(context, number):
                network = networks[client]
                means, there = of_the_others(all_means, known, client)
                news = {"means": means.numpy(), "known": there.numpy()} if number > 1 else None
                request = meter.ask(client, news)
                received, shard = tensors(read(request)), data.shard(client)
                with computing(experiment.resources, experiment.resources.client_cpus):
                    means, there = received.get("means", means), received.get("known", there)
                    fit(
                        network,
                        shard,
                        **local_training(experiment.teachers),
                        seed=stream_seed(experiment.seed, "teach", client, number),
                        pull=pull_towards(means, there, self.gamma),
                        phase=replace(TEACHER, remedy="lower teachers.optimizer.lr or gamma"),
                    )
                    own, has = class_means(network, shard)
                reply = meter.answer(request, {"means": own.numpy(), "known": has.numpy()})
                answers[client] = tensors(read(reply))
            known[:] = False  # who was away sends nothing
            for client, answer in answers.items():
                all_means[client], known[client] = answer["means"], answer["known"]
            log.end_round(models, meter)
        return log.outcome(models, uses_transfer=False)


def class_means(network: Network, shard: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean logits per label, (C, C), zeros where there is no image; which labels occur, (C,)."""
    classes = len(shard.classes)
    if len(shard) == 0:
        return torch.zeros(classes, classes), torch.zeros(classes, dtype=torch.bool)
    return per_class(predict(network, shard.images), shard)


def per_class(values: Tensor, shard: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean of rows (N, D) per label, (C, D), zeros where there is none; which occur, (C,)."""
    assert shard.labels is not None
    counts = shard.class_counts()
    sums = torch.zeros(len(counts), values.shape[1]).index_add_(0, shard.labels, values)
    return sums / counts.clamp(min=1)[:, None], counts > 0


def over_clients(means: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C, D) of the means (M, C, D) of those that have a class, (M, C); if any has, (C,)."""
    counts = known.sum(dim=0)
    return (means * known[:, :, None]).sum(dim=0) / counts.clamp(min=1)[:, None], counts > 0


def of_the_others(all_means: Tensor, known: Tensor, client: int) -> tuple[Tensor, Tensor]:
    """Mean over the other clients that have a class.

    Args:
        all_means: Every client's means, (M, C, C).
        known: Which classes each has, bool (M, C).
        client: Left out.

    Returns:
        (C, C), and which classes any of the others has, (C,).
    """
    others = known.clone()
    others[client] = False
    return over_clients(all_means, others)


def pull_towards(means: Tensor, known: Tensor, gamma: float) -> Pull | None:
    """The term gamma * KL(softmax(means[label]) || softmax(logits)) of the local loss.

    Args:
        means: Logits per label, (C, C).
        known: Labels that have them, bool (C,).
        gamma: Weight of the term.

    Returns:
        None if there is nothing to add.
    """
    if gamma == 0 or not bool(known.any()):
        return None

    def pull(_images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        there, which = means.to(logits.device), known.to(logits.device)
        distance = kd_loss(logits, there[labels], temperature=1.0)
        return gamma * (distance * which[labels]).mean()

    return pull
