"""Plain local training of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.data.images import ImageSet
from fedkd.data.views import Draws, augmented, check_augmentation
from fedkd.losses.kd import kd_loss
from fedkd.models.network import Network
from fedkd.randomness import seeded, stream
from fedkd.training.evaluation import predict
from fedkd.training.graph import Graphs
from fedkd.training.loop import Means, Measured, Phase, check_finite, train_epochs
from fedkd.training.numerics import numerics
from fedkd.training.optimizers import DEFAULT_OPTIMIZER, Optimizer

TEACHER = Phase("the teacher", "lower teachers.optimizer.lr", "teachers.batch_size")

Pull = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, labels, the network's logits) of a batch -> what is added to its loss, a scalar."""


class Passes(TypedDict):
    """Arguments of `fit_by` that a config gives."""

    epochs: int
    batch_size: int
    optimizer: Optimizer
    augment: str


@dataclass(frozen=True)
class Fit:
    """What local training gave: mean loss and accuracy over the last epoch's batches."""

    loss: float
    accuracy: float


class Regulariser:
    """Holds a teacher to the predictions of the server's student on its private images; a `Pull`.

    Args:
        student: The student, on the teacher's device.
        weight: Weight of the distance.
        temperature: Softness of both distributions.

    Raises:
        RuntimeError: the student's weights are not finite.
    """

    def __init__(self, student: Network, *, weight: float = 1.0, temperature: float = 2.0) -> None:
        check_finite(student, "the weights of the student that regularises are not finite")
        self._student = student.eval()
        self._weight = weight
        self._temperature = temperature

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The student's predictions (B, C)."""
        logits: Tensor = self._student(images)
        return logits

    def per_sample(self, logits: Tensor, student_logits: Tensor) -> Tensor:
        """The weighted term of each image, (B, C) x (B, C) -> (B,)."""
        return self._weight * kd_loss(logits, student_logits, temperature=self._temperature)

    def __call__(self, images: Tensor, _labels: Tensor, logits: Tensor) -> Tensor:
        """The weighted term of a batch, a scalar."""
        student_logits = self.logits(images)
        return self._weight * kd_loss(logits, student_logits, temperature=self._temperature).mean()


def align(
    teacher: Network,
    student: Network,
    images: Tensor,
    *,
    temperature: float = 2.0,
    epochs: int = 1,
    batch_size: int = 16,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    seed: int,
    graphs: Graphs = "auto",
) -> None:
    """Let `teacher` (in place) learn the student's predictions on the transfer images.

    FedMD's digest: Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation",
    2019, https://arxiv.org/abs/1910.03581. No private image is looked at.

    Args:
        teacher: Any network over the same classes.
        student: The server's student, on the same device.
        images: Transfer images, uint8 (N, channels, h, w).
        temperature: Softness of both distributions.
        epochs: Passes over the images.
        batch_size: Samples per step.
        optimizer: Optimiser and schedule.
        seed: Of the order of samples and dropout.
        graphs: As in `fit`.

    Raises:
        ValueError: the teacher cannot be trained so.
        RuntimeError: the student's predictions, or the teacher's loss, gradient or weights, are
            not finite.
    """
    device = teacher.mean.device
    wanted = predict(student, images)
    if not wanted.isfinite().all():
        raise RuntimeError("the student's predictions are not finite, no teacher can be aligned")
    images, wanted = images.to(device), wanted.to(device)

    def measure(_epoch: int, _step: int, index: Tensor) -> Measured:
        logits = teacher(images[index])
        loss = kd_loss(logits, wanted[index], temperature=temperature)
        return Measured(loss.mean(), len(index))

    with numerics(device, "float32"), seeded(seed, "align"):
        train_epochs(
            teacher,
            len(images),
            measure,
            optimizer,
            TEACHER,
            epochs=epochs,
            batch_size=batch_size,
            order=stream(seed, "order"),
            graphs=graphs,
        )


def fit(
    teacher: Network,
    shard: ImageSet,
    *,
    epochs: int = 10,
    batch_size: int = 16,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    augment: str = "none",
    label_smoothing: float = 0.0,
    seed: int,
    pull: Pull | None = None,
    phase: Phase = TEACHER,
    graphs: Graphs = "auto",
) -> Fit:
    """Train `teacher` (in place) on a private shard with cross entropy.

    The shard is copied to the teacher's device once, and augmented there.

    Args:
        teacher: Any network over the shard's classes.
        shard: Labelled private images.
        epochs: Passes over the shard.
        batch_size: Samples per step; a left-over batch of one is dropped.
        optimizer: Optimiser and schedule.
        augment: Recipe, a name in `fedkd.data.views.AUGMENTATIONS`.
        label_smoothing: Share of the target that is spread over all classes.
        seed: Seed of the order of samples, augmentation and dropout.
        pull: What is added to the loss.
        phase: In which words to complain.
        graphs: Whether steps are captured as graphs: "auto" on CUDA, "on", "off".

    Raises:
        RuntimeError: weights, the loss or its gradient are not finite.
        ValueError: the shard has no images or no labels, or the teacher cannot be trained so.
    """

    def measure(images: Tensor, labels: Tensor) -> Measured:
        logits = teacher(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        right = {"right": (logits.argmax(1) == labels).sum()}
        if pull is None:
            return Measured(loss, len(labels), sums=right)
        more = pull(images, labels, logits)
        return Measured(loss + more, len(labels), {"cross entropy": loss, "pull": more}, right)

    last = fit_by(
        teacher,
        shard,
        measure,
        device=teacher.mean.device,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        augment=augment,
        seed=seed,
        phase=phase,
        graphs=graphs,
        modules=[pull] if isinstance(pull, nn.Module) else [],
    )
    return Fit(last.loss, last.sums["right"] / last.count)


def fit_by(
    networks: nn.Module,
    shard: ImageSet,
    measure: Callable[[Tensor, Tensor], Measured],
    *,
    device: torch.device,
    epochs: int,
    batch_size: int,
    optimizer: Optimizer,
    augment: str,
    seed: int,
    phase: Phase = TEACHER,
    graphs: Graphs = "off",
    modules: Iterable[nn.Module] = (),
) -> Means:
    """Train one network or several (in place) on the same batches of a private shard.

    Args:
        networks: What learns, on one device.
        shard: Labelled private images.
        measure: (augmented images, labels) of a batch -> its loss.
        device: That of the networks.
        epochs: As in `fit`, like the others.
        batch_size: Likewise.
        optimizer: Likewise.
        augment: Likewise.
        seed: Likewise.
        phase: Likewise.
        graphs: Likewise.
        modules: Further modules that `measure` uses.

    Returns:
        What the last epoch gave.

    Raises:
        RuntimeError: as in `fit`.
        ValueError: likewise.
    """
    labels_of = shard.labels
    if labels_of is None:
        raise ValueError("a teacher learns from labelled images, this shard has no labels")
    check_augmentation(augment)
    draws = Draws(seed, device)
    pixels, labels_of = shard.images.to(device), labels_of.to(device)

    def measure_batch(epoch: int, step: int, index: Tensor) -> Measured:
        images = pixels[index]
        if augment != "none":
            images = augmented(images, augment, draws.of(epoch, step, "augment"))
        return measure(images, labels_of[index])

    with numerics(device, "float32"), seeded(seed, "teacher"):
        return train_epochs(
            networks,
            len(shard),
            measure_batch,
            optimizer,
            phase,
            epochs=epochs,
            batch_size=batch_size,
            order=stream(seed, "order"),
            graphs=graphs,
            draws=draws,
            modules=modules,
        )[-1]
