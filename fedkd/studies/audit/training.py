"""What an audit trains: a client's teacher once more on other images, and a proxy of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedkd.build import build_optimizer, local_training
from fedkd.config import ConfigError
from fedkd.data.images import ImageSet
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import fit_private
from fedkd.privacy.label_dp import randomised
from fedkd.randomness import seeded, stream, stream_seed
from fedkd.rounds import ExperimentContext
from fedkd.studies.audit.promise import Training
from fedkd.training.loop import Measured, Phase, train_epochs
from fedkd.training.supervised import fit

Watch = Callable[[], AbstractContextManager[None]]


def train_again(
    context: ExperimentContext,
    client: int,
    images: ImageSet,
    training: Training,
    *names: object,
    observed: Callable[[Network], Watch] | None = None,
) -> Network:
    """A fresh teacher of this client's kind, trained on `images` for all rounds as in the run.

    The student's feedback is not repeated. What protects the clients, DP-SGD's draws and noise or
    the lies among labels, is drawn anew and from the operating system.

    Args:
        context: Of the run.
        client: Whose model is taken.
        images: Labelled images.
        training: How; labels that are randomised are so once for all rounds.
        *names: Of the random streams.
        observed: Given the untrained teacher, what is entered around each private step.

    Raises:
        ConfigError: this model or its training cannot be private.
    """
    experiment = context.experiment
    model = experiment.teachers.model_of(client)
    teacher = context.network(model, "audit", *names)
    if training.label_epsilon is not None and images.labels is not None:
        classes = len(images.classes)
        labels = randomised(images.labels, classes, training.label_epsilon)
        images = replace(images, labels=labels)
    options = local_training(experiment.teachers)
    watch: Watch = nullcontext if observed is None else observed(teacher)
    for number in range(training.rounds):
        if training.mechanism is not None:
            try:
                fit_private(
                    teacher,
                    images,
                    training.mechanism,
                    optimizer=options["optimizer"],
                    augment=options["augment"],
                    label_smoothing=options["label_smoothing"],
                    watch=watch,
                )
            except ValueError as error:
                raise ConfigError(f"client {client}, model {model.name!r}: {error}") from None
        else:
            seed = stream_seed(experiment.seed, "audit", *names, number)
            fit(teacher, images, **options, seed=seed)
    return teacher.eval()


def proxy(context: ExperimentContext, answers: Tensor) -> Network:
    """What a reader of a client's answers can rebuild: a student of that client alone.

    Args:
        context: Of the run: the transfer images are known to the reader.
        answers: The client's logits on them, (N, C).
    """
    experiment = context.experiment
    options, seed = experiment.distillation, experiment.seed
    images = context.data.transfer.images.images
    network = context.network(experiment.student.model, "proxy")
    wanted = answers.softmax(1)

    def measure(_epoch: int, _step: int, index: Tensor) -> Measured:
        loss = functional.cross_entropy(network(images[index]), wanted[index])
        return Measured(loss, len(index))

    with seeded(stream_seed(seed, "audit", "proxy"), "dropout"):
        train_epochs(
            network,
            len(images),
            measure,
            build_optimizer(options.optimizer),
            Phase("the proxy", "lower distillation.optimizer.lr", "distillation.batch_size"),
            epochs=options.epochs * experiment.rounds,
            batch_size=options.batch_size,
            order=stream(seed, "audit", "proxy"),
        )
    return network


def mislabelled(pool: ImageSet, count: int, seed: int) -> ImageSet:
    """Canaries: `count` images of `pool` under a wrong label each; nobody learns them by chance.

    Raises:
        ValueError: the pool is too small.
    """
    if count > len(pool):
        raise ValueError(
            f"canaries: {count} are asked for, but only {len(pool)} labelled images were "
            "trained on by nobody"
        )
    generator = stream(seed, "audit", "canaries")
    chosen = pool.subset(torch.randperm(len(pool), generator=generator)[:count])
    assert chosen.labels is not None
    classes = len(chosen.classes)
    shift = torch.randint(1, classes, (count,), generator=generator)
    return replace(chosen, labels=(chosen.labels + shift) % classes)


def static(like: ImageSet, count: int, seed: int) -> ImageSet:
    """Canaries for DP-SGD: pictures of noise under labels of chance.

    Their gradients hardly point alike, so that each shows by itself in a noisy sum.
    """
    generator = stream(seed, "audit", "static")
    images = torch.randint(2, (count, *like.images.shape[1:]), generator=generator)
    labels = torch.randint(len(like.classes), (count,), generator=generator)
    return replace(like, images=(255 * images).to(torch.uint8), labels=labels)


def tossed(count: int, seed: int) -> np.ndarray:
    """An independent even coin for each canary, bool (count,)."""
    draws = torch.rand(count, generator=stream(seed, "audit", "coins"), dtype=torch.double)
    return draws.numpy() < 0.5


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """Both sets, one after the other."""
    assert first.labels is not None
    assert second.labels is not None
    return replace(
        first,
        images=torch.cat([first.images, second.images]),
        labels=torch.cat([first.labels, second.labels]),
    )


def matched(members: ImageSet, others: ImageSet, most: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """As many members as others of every class, at most `most` of each in all.

    A client's labels are skewed: without this, an attack that knows no more than the label would
    look like one on membership.
    """
    assert members.labels is not None
    assert others.labels is not None
    generator = stream(seed, "audit", "matched")
    rows: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for label in range(len(members.classes)):
        found = [(s.labels == label).nonzero().flatten() for s in (members, others)]  # type: ignore[union-attr]
        count = min(map(len, found))
        for chosen, index in zip(rows, found):
            chosen.append(index[torch.randperm(len(index), generator=generator)[:count]])
    keep = torch.randperm(sum(map(len, rows[0])), generator=generator)[:most]
    return members.subset(torch.cat(rows[0])[keep]), others.subset(torch.cat(rows[1])[keep])
