"""Averaging of weights, by Flower's own code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedkd.config import ConfigError
from fedkd.models.network import Network
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.loop import RoundLog, fresh_student, groups, model, train
from fedkd.simulations.baselines.traffic import Arrays, MessageMeter, load, read, weights

Refine = Callable[[Network, Sequence[Message], int], None]
"""(averaged network, the clients' replies, round): improves the network in place."""


@dataclass(frozen=True)
class Travel:
    """What is averaged, and how it travels.

    Attributes:
        make: The student's network as it begins.
        down: What of it is sent to a client.
        up: What a client sends back.
        load: Puts either into a network.
    """

    make: Callable[[ExperimentContext], Network] = fresh_student
    down: Callable[[Network], Arrays] = weights
    up: Callable[[Network], Arrays] = weights
    load: Callable[[Network, Arrays | ArrayRecord], None] = load


WHOLE = Travel()
"""All weights and buffers."""


@BASELINES.register("fedavg")
class FedAvg(Baseline):
    """Averages the clients' weights by their number of examples.

    Args:
        epochs: Local epochs; default: `teachers.epochs`.

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
            Data", AISTATS 2017, https://arxiv.org/abs/1602.05629
    """

    def __init__(self, *, epochs: int | None = None) -> None:
        self.epochs = at_least_one("fedavg", "epochs", epochs)

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if clients have other networks than the student's."""
        refuse_other_networks(context, "fedavg")
        return average(context, on_round, FlowerFedAvg(), epochs=self.epochs)


def average(
    context: ExperimentContext,
    on_round: OnRound,
    strategy: FlowerFedAvg,
    *,
    epochs: int | None,
    mu: float = 0.0,
    refine: Refine | None = None,
    travel: Travel = WHOLE,
) -> Outcome:
    """Rounds of averaging; each client trains the student's network as it trains its teacher."""
    log = RoundLog(context, on_round)
    student = travel.make(context)
    grouped = {n: groups(context, n) for n in range(1, context.experiment.rounds + 1)}
    most = max(len(group) for each in grouped.values() for group in each)
    at_clients = [travel.make(context) for _ in range(most)]
    if context.experiment.resources.client_gpus == 0:
        for local in at_clients:
            local.cpu()
    config = {"proximal-mu": mu} if mu > 0 else {}
    for number in grouped:
        meter, replies = MessageMeter(number), []
        for group in grouped[number]:
            requests = [meter.ask(client, travel.down(student), **config) for client in group]
            networks = dict(zip(group, at_clients, strict=False))
            for network, request in zip(networks.values(), requests, strict=True):
                travel.load(network, read(request))
            with ExitStack() as pulled:
                if mu > 0:
                    for network in networks.values():
                        pulled.enter_context(held(network, mu))
                train(context, networks, number, epochs)
            for (client, network), request in zip(networks.items(), requests, strict=True):
                examples = len(context.data.shard(client))
                replies.append(meter.answer(request, travel.up(network), examples))
        with quiet():
            arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
        travel.load(student, arrays)
        if refine is not None:
            refine(student, replies, number)
        log.end_round([model(student)], meter)
    return log.outcome([model(student)], uses_transfer=False)


@contextmanager
def held(network: Network, mu: float) -> Iterator[None]:
    """Pull a network to where it is now while it trains: a term mu/2 |w - w0|^2 in its loss.

    Its gradient, mu (w - w0), is added as backward arrives at each parameter, so that local
    training itself need not know of it.
    """
    hooks = []
    for parameter in network.parameters():
        start = parameter.detach().clone()
        hooks.append(
            parameter.register_hook(
                lambda gradient, now=parameter, start=start: gradient + mu * (now.detach() - start)
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_other_networks(context: ExperimentContext, name: str) -> None:
    """Raise `ConfigError` unless every client's network is the student's."""
    experiment = context.experiment
    wanted = experiment.student.model
    others = sorted({m.name for m in experiment.teachers.models if m != wanted})
    if others:
        raise ConfigError(
            f"teachers.models: {name!r} averages weights, so all clients need the student's model "
            f"{wanted.name!r} with the same options, not {', '.join(others)}; set "
            f"teachers.models=[{wanted.name}] or leave {name!r} out"
        )


def at_least_one(name: str, key: str, value: int | None) -> int | None:
    """The value. Raises `ValueError` if it is less than 1."""
    if value is not None and value < 1:
        raise ValueError(f"baseline {name!r}: {key} must be at least 1, got {value}")
    return value


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that Flower logs for every aggregation."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
