"""FedKD as published by Wu et al.: a mentor that stays, a mentee whose updates travel, compressed.

It shares its name with this package, and no more than that.
"""

from __future__ import annotations

from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.build import local_training
from fedkd.data.images import ImageSet
from fedkd.losses.kd import kd_loss
from fedkd.models.network import Network
from fedkd.randomness import seeded, stream_seed
from fedkd.rounds import ExperimentContext, computing
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedproto import width
from fedkd.simulations.baselines.loop import RoundLog, asked, fresh_student, fresh_teachers, model
from fedkd.simulations.baselines.traffic import Arrays, MessageMeter, load, read, weights
from fedkd.training.loop import Measured, Phase
from fedkd.training.supervised import Passes, fit_by

PAIR = Phase("a client's mentor and mentee", "lower teachers.optimizer.lr", "teachers.batch_size")

# What one network still gets wrong divides what both learn from each other: never by nothing.
_LEAST = 1e-8


@BASELINES.register("fedkd_wu")
class FedKDWu(Baseline):
    """The published FedKD: a private mentor teaches a shared mentee, and learns from it.

    Updates of the mentee travel as factors of low rank, with a share of their energy that grows
    from the first round to the last.

    Args:
        energy_start: Share before the first round, in (0, 1].
        energy_end: Share in the last round.

    References:
        Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature
            Communications 2022, https://arxiv.org/abs/2108.13323
    """

    def __init__(self, *, energy_start: float = 0.95, energy_end: float = 0.98) -> None:
        if not 0 < energy_start <= energy_end <= 1:
            raise ValueError(
                "baseline 'fedkd_wu': energy_start must be in (0, energy_end], and energy_end at "
                f"most 1, got {energy_start} and {energy_end}"
            )
        self.energy_start, self.energy_end = energy_start, energy_end

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if a network ends in no linear layer."""
        log = RoundLog(context, on_round)
        experiment, data = context.experiment, context.data
        student, networks = fresh_student(context), fresh_teachers(context)
        device = networks[0].mean.device
        copy = fresh_student(context).to(device)
        narrow = width("fedkd_wu", student, "the student's network")
        bridges = []
        for client, network in enumerate(networks):
            wide = width("fedkd_wu", network, f"the network of client {client}")
            with seeded(experiment.seed, "bridge", client):
                bridges.append(nn.Linear(narrow, wide, bias=False).to(device))
        # What those hold who were asked in the last round, and how the mentee has moved since.
        known, update = set[int](), dict[str, np.ndarray]()
        state = held = {name: value.copy() for name, value in weights(student).items()}
        for number in range(1, experiment.rounds + 1):
            grown = (self.energy_end - self.energy_start) * number / experiment.rounds
            energy = self.energy_start + grown
            meter, changes = MessageMeter(number), []
            clients = asked(context, number)
            for client in clients:
                up_to_date, shard = client in known, data.shard(client)
                request = meter.ask(client, update if up_to_date else state)
                news = read(request)
                before = added(held, unpacked(news, held)) if up_to_date else news
                load(copy, before)
                with computing(experiment.resources, experiment.resources.client_cpus):
                    learn_mutually(
                        networks[client],
                        copy,
                        bridges[client],
                        shard,
                        seed=stream_seed(experiment.seed, "teach", client, number),
                        **local_training(experiment.teachers),
                    )
                moved = packed(change(before, weights(copy)), energy)
                reply = meter.answer(request, moved, len(shard))
                changes.append((len(shard), unpacked(read(reply), held)))
            update = packed(mean_change(changes), energy)
            known, held, state = set(clients), state, added(state, unpacked(update, state))
            load(student, state)
            log.end_round([model(student)], meter)
        return log.outcome([model(student)], uses_transfer=False)


def adaptive_loss(
    mentor: Tensor,
    mentee: Tensor,
    labels: Tensor,
    distance: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The sum of both networks' losses, a scalar: the surer both are, the more each teaches.

    Args:
        mentor: Logits, (B, C).
        mentee: Logits, (B, C).
        labels: Classes, (B,).
        distance: Of their hidden features, a scalar: it counts in the loss of either.
        label_smoothing: Of the cross entropies.
    """
    pair = ((mentor, mentee.detach()), (mentee, mentor.detach()))
    own = [functional.cross_entropy(x, labels, label_smoothing=label_smoothing) for x, _ in pair]
    taught = [kd_loss(logits, others, temperature=1.0).mean() for logits, others in pair]
    task = own[0] + own[1]
    return task + (taught[0] + taught[1] + distance) / task.detach().clamp(min=_LEAST)


def learn_mutually(
    mentor: Network,
    mentee: Network,
    bridge: nn.Linear,
    shard: ImageSet,
    *,
    seed: int,
    label_smoothing: float,
    **options: Unpack[Passes],
) -> None:
    """Train both (in place) on the same batches, and the map from one's features to the other's."""

    def measure(images: Tensor, labels: Tensor) -> Measured:
        one, other = mentor.read(images), mentee.read(images)
        assert one.pooled is not None
        distance = functional.mse_loss(bridge(other.pooled), one.pooled)
        loss = adaptive_loss(
            one.logits, other.logits, labels, distance, label_smoothing=label_smoothing
        )
        return Measured(loss, len(labels))

    learners, device = nn.ModuleList([mentor, mentee, bridge]), mentor.mean.device
    fit_by(learners, shard, measure, device=device, seed=seed, phase=PAIR, **options)


def packed(moved: Arrays, energy: float) -> dict[str, np.ndarray]:
    """A change of weights as two factors per matrix, of the least rank that has that energy.

    A kernel of a convolution is a matrix with one row per output. What would not become less stays
    as it is.
    """
    sent = {}
    for name, array in moved.items():
        if array.ndim < 2:
            sent[name] = array
            continue
        matrix = torch.from_numpy(array.reshape(len(array), -1))
        u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
        rank = least_rank(sigma, energy)
        if rank * sum(matrix.shape) < matrix.numel():
            sent[f"{name}/u"] = (u[:, :rank] * sigma[:rank]).numpy()
            sent[f"{name}/v"] = v[:rank].numpy()
        else:
            sent[name] = array
    return sent


def least_rank(sigma: Tensor, energy: float) -> int:
    """How many of the largest singular values (falling) hold more than that share of the squares.

    All but zeros, if none do.
    """
    squares = sigma.double().square().cumsum(dim=0)
    reached = int((squares <= energy * squares[-1]).sum()) + 1
    return min(reached, int((sigma > 0).sum()))


def unpacked(sent: Arrays, like: Arrays) -> dict[str, np.ndarray]:
    """The inverse of `packed`, in the shapes of the weights."""
    whole = {}
    for name, weight in like.items():
        if name in sent:
            whole[name] = sent[name]
        elif f"{name}/u" in sent:
            product = torch.from_numpy(sent[f"{name}/u"]) @ torch.from_numpy(sent[f"{name}/v"])
            whole[name] = product.numpy().reshape(weight.shape)
    return whole


def change(before: Arrays, after: Arrays) -> dict[str, np.ndarray]:
    """What has moved; batch norm's counters of batches stay at home."""
    return {
        name: value - before[name]
        for name, value in after.items()
        if np.issubdtype(value.dtype, np.floating)
    }


def added(state: Arrays, moved: Arrays) -> dict[str, np.ndarray]:
    """The state after such a change."""
    return {name: value + moved[name] if name in moved else value for name, value in state.items()}


def mean_change(changes: list[tuple[int, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Mean of changes by their clients' numbers of examples."""
    total = sum(size for size, _ in changes)
    names = changes[0][1]
    return {
        name: np.sum([moved[name] * np.float32(n / total) for n, moved in changes], axis=0)
        for name in names
    }
