"""What the baselines share: fresh networks, local training, distillation, and the judge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fedkd.build import build_optimizer, device_of, local_training
from fedkd.config import ConfigError, Experiment
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import distill
from fedkd.knowledge.payload import AGGREGATE, Fused
from fedkd.knowledge.query import Images
from fedkd.losses.base import DistillationLoss
from fedkd.losses.kd import KDLoss
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.rounds import ExperimentContext, computing
from fedkd.simulations.baselines.base import OnRound, Outcome, RoundResult
from fedkd.simulations.baselines.traffic import Arrays, MessageMeter, read
from fedkd.training.batched import fit_many
from fedkd.training.evaluation import accuracy, calibration, per_class_accuracy, predict
from fedkd.training.optimizers import Optimizer

Model = Callable[[Tensor], Tensor]
"""Images, uint8 (N, channels, h, w), to logits (N, C)."""

Learn = Callable[[int, int, Network, Arrays], None]
"""(round, client, its network, what it received)."""

Answer = Callable[[int, Network], Arrays]
"""(client, its network) -> its answer."""


def check_plain(experiment: Experiment) -> None:
    """Raise `ConfigError` where clients do not train as baselines do."""
    if experiment.teachers.noisy is not None:
        raise ConfigError(
            "teachers.noisy: a baseline's clients train plainly; give it to fedkd's rows alone, "
            "{name: NAME, fedkd: {teachers.noisy: ...}}"
        )


class RoundLog:
    """Times the rounds, judges what they leave behind, and tells who listens.

    Models are the server's only one, or one for each client. Judging takes none of the method's
    time.
    """

    def __init__(self, context: ExperimentContext, on_round: OnRound) -> None:
        if context.experiment.data.public is not None:
            raise ConfigError(
                "data.public: a baseline trains all clients in one place, but their images are "
                "not here; compare on a data set that fedkd deals"
            )
        check_plain(context.experiment)
        self._context, self._data = context, context.data
        self._on_round = on_round
        self._rounds: list[RoundResult] = []
        self._started = time.perf_counter()

    def end_round(self, models: Sequence[Model], meter: MessageMeter | None = None) -> None:
        """Write a round down; scores are means over the models."""
        seconds = time.perf_counter() - self._started
        test, labels = self._data.test, self._data.test.labels
        assert labels is not None
        predicted = [model(test.images) for model in models]
        per_class = torch.tensor([per_class_accuracy(each, labels) for each in predicted]).mean(0)
        result = RoundResult(
            round=len(self._rounds) + 1,
            accuracy=_mean([accuracy(each, labels) for each in predicted]),
            per_class=[None if math.isnan(share) else share for share in per_class.tolist()],
            ece=_mean([calibration(each, labels).ece for each in predicted]),
            up=0 if meter is None else meter.up,
            down=0 if meter is None else meter.down,
            seconds=seconds,
        )
        self._rounds.append(result)
        self._on_round(result)
        self._started = time.perf_counter()

    def outcome(self, models: Sequence[Model], *, uses_transfer: bool) -> Outcome:
        """All rounds, and the final models on the held-out images of the last round's clients."""
        last = asked(self._context, self._context.experiment.rounds)
        single = models[0] if len(models) == 1 else None
        return Outcome(
            rounds=tuple(self._rounds),
            holdouts=tuple(
                _share(single or models[n], self._data.holdout(n))
                if n in last and self._data.of(n).modality == self._data.modality
                else None
                for n in range(self._data.num_clients)
            ),
            predictions=None if single is None else single(self._data.test.images),
            uses_transfer=uses_transfer,
        )


def asked(context: ExperimentContext, round_number: int) -> list[int]:
    """The clients that take part in a round, in client order: the same in every method.

    Raises:
        ConfigError: there is none.
    """
    cohort = context.cohort(round_number)
    if not cohort.asked:
        raise ConfigError(
            f"federation.participation.sampler: nobody is there in round {round_number}, and a "
            "baseline has no round without clients"
        )
    return sorted(cohort.asked[: cohort.wanted])


def model(network: Network) -> Model:
    """A network as the judge sees it."""
    return partial(predict, network)


def fresh_student(context: ExperimentContext) -> Network:
    """The server's untrained network, on the server's device; in every method the same."""
    experiment = context.experiment
    network = context.network(experiment.student.model, "student")
    return network.to(device_of(experiment))


def fresh_teachers(context: ExperimentContext) -> list[Network]:
    """The clients' untrained networks, on the clients' device: those fedkd's clients start from."""
    experiment = context.experiment
    granted = experiment.resources.client_gpus > 0 and torch.cuda.is_available()
    networks = [
        context.network(experiment.teachers.model_of(client), "teacher", client)
        for client in range(experiment.clients)
    ]
    return [network.to("cuda" if granted else "cpu") for network in networks]


def groups(context: ExperimentContext, round_number: int) -> list[list[int]]:
    """Those asked that are trained at once: all (`resources.batch_clients`), or each alone."""
    clients = asked(context, round_number)
    if context.experiment.resources.clients_together:
        return [clients]
    return [[client] for client in clients]


def train(
    context: ExperimentContext,
    networks: Mapping[int, Network],
    round_number: int,
    epochs: int | None = None,
) -> None:
    """Local training of some clients in a round, in place: what fedkd's clients do, same draws."""
    experiment = context.experiment
    with computing(experiment.resources, experiment.resources.client_cpus):
        fits = fit_many(
            list(networks.values()),
            [context.data.shard(client) for client in networks],
            **local_training(experiment.teachers, epochs),
            seeds=[stream_seed(experiment.seed, "teach", each, round_number) for each in networks],
            together=len(networks) > 1,
        )
    for each in fits:
        if isinstance(each, Exception):
            raise each


def local_round(
    context: ExperimentContext,
    networks: Sequence[Network],
    meter: MessageMeter,
    news: Sequence[Arrays | None],
    learn: Learn,
    answer: Answer,
) -> dict[int, dict[str, Tensor]]:
    """A round at those asked: each learns from the news, trains on its own images, and answers.

    Args:
        context: Of the comparison.
        networks: Of all clients.
        meter: Of the round.
        news: For each client, asked or not.
        learn: What a client does with its news.
        answer: What it answers.

    Returns:
        Client -> its answer as it arrived, in client order.
    """
    answers = {}
    for group in groups(context, meter.round):
        requests = {client: meter.ask(client, news[client]) for client in group}
        for client, request in requests.items():
            received = read(request)
            if received:
                learn(meter.round, client, networks[client], received)
        train(context, {client: networks[client] for client in group}, meter.round)
        for client, request in requests.items():
            reply = meter.answer(request, answer(client, networks[client]))
            answers[client] = tensors(read(reply))
    return answers


def distill_client(
    context: ExperimentContext,
    network: Network,
    client: int,
    round_number: int,
    logits: Tensor,
    *,
    epochs: int | None,
    loss: DistillationLoss | None = None,
) -> None:
    """Distil the server's answers (N, C) about the transfer images into a client's network.

    Without `epochs` those of `teachers`; without a `loss`, KL to the softmax of the answers.
    """
    experiment = context.experiment
    options = experiment.teachers
    with computing(experiment.resources, experiment.resources.client_cpus):
        _distil(
            context,
            network,
            logits,
            epochs=options.epochs if epochs is None else epochs,
            batch_size=options.batch_size,
            optimizer=build_optimizer(options.optimizer),
            seed=stream_seed(experiment.seed, "digest", client, round_number),
            loss=loss,
            images=context.images(Images.TRANSFER, client).images,
        )


def distill_server(
    context: ExperimentContext, student: Network, logits: Tensor, round_number: int, times: int = 1
) -> None:
    """Distil logits (N, C) about the transfer set into the server's network, in place.

    KL to their softmax at temperature 1, with epochs, batches and optimiser of `distillation`.
    """
    options = context.experiment.distillation
    _distil(
        context,
        student,
        logits,
        epochs=options.epochs * times,
        batch_size=options.batch_size,
        optimizer=build_optimizer(options.optimizer),
        seed=stream_seed(context.experiment.seed, "learn", round_number),
    )


def log_of(probabilities: Tensor) -> Tensor:
    """Logits whose softmax they are; also of hard labels."""
    return probabilities.clamp(min=1e-12).log()


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (N,) as probabilities (N, C), float32."""
    return torch.nn.functional.one_hot(labels, classes).float()


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Arrays as tensors of their own."""
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _distil(
    context: ExperimentContext,
    network: Network,
    logits: Tensor,
    *,
    epochs: int,
    batch_size: int,
    optimizer: Optimizer,
    seed: int,
    loss: DistillationLoss | None = None,
    images: Tensor | None = None,
) -> None:
    batches = TransferBatches(
        context.data.transfer.images.images if images is None else images,
        Fused.of(AGGREGATE, logits),
        batch_size=batch_size,
        seed=seed,
        device=network.mean.device,
    )
    objective = Objective([Term("kd", loss or KDLoss(temperature=1.0))])
    distill(network, batches, objective, epochs=epochs, optimizer=optimizer, seed=seed)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(judged: Model, images: ImageSet) -> float | None:
    if len(images) == 0 or images.labels is None:
        return None
    return accuracy(judged(images.images), images.labels)
