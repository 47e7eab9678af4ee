"""Mean features per class instead of weights or logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.build import local_training
from fedkd.config import ConfigError
from fedkd.data.images import ImageSet
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.rounds import ExperimentContext, computing
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fd import over_clients, per_class
from fedkd.simulations.baselines.loop import RoundLog, asked, fresh_teachers, model, tensors
from fedkd.simulations.baselines.traffic import MessageMeter, read
from fedkd.training.supervised import TEACHER, fit

_CHUNK = 512


@BASELINES.register("fedproto")
class FedProto(Baseline):
    """Holds the features of each private image to the mean features of its class over all clients.

    Discloses to the server which classes a client has.

    Args:
        weight: Of that term in the local loss.

    References:
        Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI
            2022, https://arxiv.org/abs/2105.00243
    """

    has_student = False

    def __init__(self, *, weight: float = 1.0) -> None:
        if weight < 0:
            raise ValueError(f"baseline 'fedproto': weight must not be negative, got {weight}")
        self.weight = weight

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if networks have features of different widths."""
        return prototype_rounds(
            "fedproto",
            context,
            on_round,
            held_to(self.weight),
            lambda _, answers: mean_prototypes(answers),
        )


Receive = Callable[[Network, dict[str, Tensor]], "Prototypes | None"]
"""(a client's network, what it was sent) -> what is added to its local loss."""

Merge = Callable[[int, list[dict[str, Tensor]]], dict[str, Tensor]]
"""(round, the clients' `means` (C, D) and `known` (C,)) -> what is sent to all of them."""


def prototype_rounds(
    name: str, context: ExperimentContext, on_round: OnRound, receive: Receive, merge: Merge
) -> Outcome:
    """Rounds in which clients send the mean features of their classes, and learn from others'."""
    log = RoundLog(context, on_round)
    experiment, data = context.experiment, context.data
    networks = fresh_teachers(context)
    models = [model(network) for network in networks]
    _check_widths(name, networks)
    shared: dict[str, Tensor] = {}
    for number in range(1, experiment.rounds + 1):
        meter, answers = MessageMeter(number), {}
        for client in asked(context, number):
            network, shard = networks[client], data.shard(client)
            news = {key: value.numpy() for key, value in shared.items()} or None
            request = meter.ask(client, news)
            received = tensors(read(request))
            pull = receive(network, received) if received else None
            with computing(experiment.resources, experiment.resources.client_cpus):
                try:
                    fit(
                        network,
                        shard,
                        **local_training(experiment.teachers),
                        seed=stream_seed(experiment.seed, "teach", client, number),
                        pull=pull,
                        phase=replace(TEACHER, remedy="lower teachers.optimizer.lr or weight"),
                    )
                finally:
                    if pull is not None:
                        pull.remove()
                means, known = class_features(network, shard)
            reply = meter.answer(request, {"means": means.numpy(), "known": known.numpy()})
            answers[client] = tensors(read(reply))
        shared = merge(number, list(answers.values()))
        log.end_round(models, meter)
    return log.outcome(models, uses_transfer=False)


def held_to(weight: float) -> Receive:
    """Clients are held to the prototypes that they receive."""
    return lambda network, received: Prototypes(network, received, weight) if weight else None


class Prototypes:
    """weight * mse(features, prototype of the label), added to a network's local loss; a `Pull`.

    The features are those of the same forward pass that gave the logits.

    Args:
        network: It is trained, and its features are read from what enters its classifier.
        received: `means` (C, D) and `known` (C,).
        weight: Of the term.
    """

    def __init__(self, network: Network, received: dict[str, Tensor], weight: float) -> None:
        device = network.mean.device
        self._means, self._known = received["means"].to(device), received["known"].to(device)
        self._weight = weight
        self._features = torch.empty(0)
        assert network.head is not None
        self._hook = network.head.register_forward_pre_hook(self._keep)

    def _keep(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].flatten(1)

    def __call__(self, _images: Tensor, labels: Tensor, _logits: Tensor) -> Tensor:
        """The term of a batch; classes that nobody has sent pull at nobody."""
        return self._weight * prototype_distance(self._features, self._means, self._known, labels)

    def remove(self) -> None:
        """Listen no longer."""
        self._hook.remove()


def prototype_distance(features: Tensor, means: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of features (B, D) and the prototypes of their labels, a scalar.

    As in the published code, a sample without a prototype is held to its own features: it counts
    in the mean and pulls nowhere.
    """
    goal = torch.where(known[labels][:, None], means[labels], features.detach())
    return functional.mse_loss(features, goal)


@torch.no_grad()
def class_features(network: Network, shard: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean features per label, (C, D), zeros where there is no image; which labels occur, (C,)."""
    device, training = network.mean.device, network.training
    network.eval()
    parts = [network.read(part.to(device)).pooled for part in shard.images.split(_CHUNK)]
    network.train(training)
    return per_class(torch.cat([part.cpu() for part in parts if part is not None]), shard)


def mean_prototypes(answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over the clients that have a class: `means` (C, D) and `known` (C,)."""
    means = torch.stack([answer["means"] for answer in answers])
    known = torch.stack([answer["known"] for answer in answers])
    mean, there = over_clients(means, known)
    return {"means": mean, "known": there}


def labelled_prototypes(answers: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Those of all clients, (N, D), and their classes, (N,)."""
    features = torch.cat([answer["means"][answer["known"]] for answer in answers])
    return features, torch.cat([answer["known"].nonzero().flatten() for answer in answers])


def width(name: str, network: Network, whose: str) -> int:
    """Of a network's features. Raises `ConfigError` if it does not end in a linear layer."""
    if network.head is None:
        raise ConfigError(
            f"methods: {name!r} reads what enters the last linear layer, and {whose} ends in "
            "something else; leave the method out"
        )
    return network.head.in_features


def _check_widths(name: str, networks: list[Network]) -> None:
    widths: dict[int, int] = {}
    for client, network in enumerate(networks):
        widths.setdefault(width(name, network, f"the network of client {client}"), client)
    if len(widths) > 1:
        (one, first), (other, second), *_ = widths.items()
        raise ConfigError(
            f"methods: {name!r} shares features, but those of client {first} are {one} wide "
            f"and those of client {second} {other}; set teachers.models to networks of one width, "
            "or leave the method out"
        )
