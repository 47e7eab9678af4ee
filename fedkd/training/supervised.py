"""Plain local training of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.config import Teachers
from fedkd.data.images import ImageSet
from fedkd.data.views import augment_batch
from fedkd.losses.kd import kd_loss
from fedkd.models.network import Network
from fedkd.randomness import seeded, stream
from fedkd.training.evaluation import predict
from fedkd.training.loop import Measured, Phase, check_finite, train_epochs

TEACHER = Phase("the teacher", "lower teachers.optimizer.lr", "teachers.batch_size")

Pull = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, labels, the network's logits) of a batch -> what is added to its loss, a scalar."""


@dataclass(frozen=True)
class Fit:
    """What local training gave: mean loss and accuracy over the last epoch's batches."""

    loss: float
    accuracy: float


def align(
    teacher: Network, student: Network, images: Tensor, options: Teachers, *, seed: int
) -> None:
    """Let `teacher` (in place) learn what the student says of the transfer images.

    FedMD's digest: Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation",
    2019, https://arxiv.org/abs/1910.03581. No private image is looked at.

    Args:
        teacher: Any network over the same classes.
        student: The server's student, on the same device.
        images: Transfer images, uint8 (N, channels, h, w).
        options: Batch size, optimiser, and in `feedback` epochs and temperature.
        seed: Of the order of samples and dropout.

    Raises:
        ValueError: the teacher cannot be trained so.
        RuntimeError: the student's predictions, or the teacher's loss, gradient or weights, are
            not finite.
    """
    feedback = options.feedback
    device = teacher.mean.device
    wanted = predict(student, images)
    if not wanted.isfinite().all():
        raise RuntimeError("the student's predictions are not finite, no teacher can be aligned")

    def measure(_epoch: int, _step: int, index: Tensor) -> Measured:
        logits = teacher(images[index].to(device))
        loss = kd_loss(logits, wanted[index].to(device), temperature=feedback.temperature)
        return Measured(loss.mean(), len(index))

    with seeded(seed, "align"):
        train_epochs(
            teacher,
            len(images),
            measure,
            options.optimizer,
            TEACHER,
            epochs=feedback.epochs,
            batch_size=options.batch_size,
            order=stream(seed, "order"),
        )


def fit(
    teacher: Network,
    shard: ImageSet,
    options: Teachers,
    *,
    seed: int,
    student: Network | None = None,
) -> Fit:
    """Train `teacher` (in place) on a private shard.

    Args:
        teacher: Any network over the shard's classes.
        shard: Labelled private images.
        options: Epochs, batch size, optimiser, augmentation.
        seed: Seed of the order of samples, augmentation and dropout.
        student: The server's student as a regulariser: the teacher is also held to its
            predictions on the private images, weighted by `options.feedback`.

    Raises:
        RuntimeError: weights of teacher or student, the loss or its gradient are not finite.
        ValueError: the shard has no images or no labels, or the teacher cannot be trained so.
    """
    if student is None:
        return fit_towards(teacher, shard, options, None, seed=seed)
    student.eval()
    check_finite(student, "the weights of the student that regularises are not finite")
    feedback = options.feedback

    def pull(images: Tensor, _labels: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = student(images)
        return feedback.weight * kd_loss(logits, wanted, temperature=feedback.temperature).mean()

    return fit_towards(teacher, shard, options, pull, seed=seed)


def fit_towards(
    teacher: Network,
    shard: ImageSet,
    options: Teachers,
    pull: Pull | None,
    *,
    seed: int,
    phase: Phase = TEACHER,
) -> Fit:
    """`fit` with any term beside cross entropy.

    Args:
        teacher: Trained in place.
        shard: As in `fit`.
        options: As in `fit`.
        pull: What is added to the loss; None is nothing.
        seed: As in `fit`.
        phase: In which words to complain.

    Raises:
        RuntimeError: as `fit`.
        ValueError: as `fit`.
    """
    labels_of = shard.labels
    if labels_of is None:
        raise ValueError("a teacher learns from labelled images, this shard has no labels")
    device = teacher.mean.device

    def measure(epoch: int, step: int, index: Tensor) -> Measured:
        images = augment_batch(
            shard.images[index], options.augment, seed, "augment", epoch, step
        ).to(device)
        labels = labels_of[index].to(device)
        logits = teacher(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
        right = {"right": (logits.argmax(1) == labels).sum()}
        if pull is None:
            return Measured(loss, len(index), sums=right)
        more = pull(images, labels, logits)
        return Measured(loss + more, len(index), {"cross entropy": loss, "pull": more}, right)

    with seeded(seed, "teacher"):
        last = train_epochs(
            teacher,
            len(shard),
            measure,
            options.optimizer,
            phase,
            epochs=options.epochs,
            batch_size=options.batch_size,
            order=stream(seed, "order"),
        )[-1]
    return Fit(last.loss, last.sums["right"] / last.count)
