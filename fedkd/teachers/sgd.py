"""Plain local training of a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.config import Teachers
from fedkd.data.images import ImageSet
from fedkd.data.views import augment_batch
from fedkd.evaluation import predict
from fedkd.losses.kd import kd_loss
from fedkd.models.network import Network
from fedkd.optimization import make_optimizer, steps_per_epoch
from fedkd.randomness import seeded, stream


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
    """
    feedback = options.feedback
    device = teacher.mean.device
    told = predict(student, images)
    batch = min(options.batch_size, len(images))
    steps = steps_per_epoch(len(images), batch) * feedback.epochs
    optimizer, schedule = make_optimizer(teacher.parameters(), options.optimizer, steps)
    order = stream(seed, "order")
    teacher.train()
    with seeded(seed, "align"):
        for _ in range(feedback.epochs):
            for index in torch.randperm(len(images), generator=order).split(batch):
                if len(index) == 1 and len(images) > 1:
                    continue
                logits = teacher(images[index].to(device))
                wanted = told[index].to(device)
                loss = kd_loss(logits, wanted, temperature=feedback.temperature).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    teacher.eval()


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
        shard: Labelled private images; an empty shard trains nothing.
        options: Epochs, batch size, optimiser, augmentation.
        seed: Seed of the order of samples, augmentation and dropout.
        student: The server's student as a regulariser: the teacher is also held to its
            predictions on the private images, weighted by `options.feedback`.

    Raises:
        RuntimeError: the loss is no longer finite.
        ValueError: the shard has no labels.
    """
    if shard.labels is None:
        raise ValueError("a teacher learns from labelled images, this shard has no labels")
    total = len(shard)
    if total == 0:
        return Fit(float("nan"), float("nan"))
    batch = min(options.batch_size, total)
    steps = steps_per_epoch(total, batch) * options.epochs
    optimizer, schedule = make_optimizer(teacher.parameters(), options.optimizer, steps)
    device = teacher.mean.device
    order = stream(seed, "order")
    loss_sum = correct = seen = 0.0
    if student is not None:
        student.eval()
    teacher.train(total > 1)
    with seeded(seed, "teacher"):
        for epoch in range(options.epochs):
            loss_sum = correct = seen = 0.0
            for step, index in enumerate(torch.randperm(total, generator=order).split(batch)):
                if len(index) == 1 and total > 1:
                    continue
                images = augment_batch(
                    shard.images[index], options.augment, seed, "augment", epoch, step
                ).to(device)
                labels = shard.labels[index].to(device)
                logits = teacher(images)
                loss = functional.cross_entropy(
                    logits, labels, label_smoothing=options.label_smoothing
                )
                if student is not None:
                    with torch.no_grad():
                        told = student(images)
                    pull = kd_loss(logits, told, temperature=options.feedback.temperature).mean()
                    loss = loss + options.feedback.weight * pull
                if not torch.isfinite(loss):
                    raise RuntimeError(
                        f"the teacher's loss is {loss.item()} in epoch {epoch + 1}; "
                        "lower teachers.optimizer.lr"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if options.optimizer.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(teacher.parameters(), options.optimizer.max_grad_norm)
                optimizer.step()
                schedule.step()
                loss_sum += float(loss.detach()) * len(index)
                correct += float((logits.argmax(1) == labels).sum())
                seen += len(index)
    teacher.eval()
    return Fit(loss_sum / seen, correct / seen)
