"""What a network can learn from the transfer images before anybody has said what they show."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.config import Optimizer
from fedkd.data.views import augment_batch
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Pooled
from fedkd.models.network import Network
from fedkd.randomness import seeded, stream
from fedkd.training.loop import Measured, Phase, train_epochs

# Width of the space in which views are compared.
WIDTH = 64


def contrastive_loss(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent: each image finds its other view among all views of all images.

    Args:
        first: (B, D) of one view of each image; B at least 2.
        second: (B, D) of the other.
        temperature: Of the softmax over cosines.

    Returns:
        Mean over the 2B views, a scalar.

    References:
        Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
            ICML 2020, https://arxiv.org/abs/2002.05709, Eq. 1
    """
    count = len(first)
    views = functional.normalize(torch.cat([first, second]).float(), dim=1)
    cosines = views @ views.T / temperature
    cosines.fill_diagonal_(-torch.inf)  # nobody is compared with itself
    other = torch.arange(2 * count, device=views.device).roll(count)
    return functional.cross_entropy(cosines, other)


def pretrain(
    network: Network,
    images: Tensor,
    *,
    epochs: int,
    augment: str = "randaugment",
    batch_size: int = 128,
    optimizer: Optimizer | None = None,
    seed: int = 0,
) -> list[float]:
    """Train `network` (in place) to see two augmented views of an image as alike (SimCLR).

    Its classifier is left as it is; the projection used for comparing views is thrown away.

    Args:
        network: With a linear classifier, whose input is what learns.
        images: uint8 (N, channels, h, w), N at least 2; no labels are used.
        epochs: Passes over the images.
        augment: Recipe of both views.
        batch_size: Images per step; more are more to tell apart.
        optimizer: Optimiser and schedule; default: the student's defaults.
        seed: Of order, augmentation and projection.

    Returns:
        Mean loss of each epoch, over its images.

    Raises:
        ValueError: the network has no classification layer whose input could be read, or there
            are not two images to compare.
        RuntimeError: loss, gradient or weights are no longer finite.
    """
    if len(images) < 2 or batch_size < 2:
        raise ValueError(
            "pretraining compares images with each other: it needs at least 2, and a batch_size of "
            f"at least 2, got {len(images)} images and batch_size {batch_size}"
        )
    device = network.mean.device
    width = extract(network, images[:1], (Pooled(),))[Pooled()].shape[1]
    with seeded(seed, "projection"):
        project = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    project.to(device)

    def measure(epoch: int, step: int, index: Tensor) -> Measured:
        here = images[index].to(device)
        first, second = (
            project(network.read(augment_batch(here, augment, seed, view, epoch, step)).pooled)
            for view in ("first", "second")
        )
        return Measured(contrastive_loss(first, second), len(index))

    with seeded(seed, "pretrain"):
        history = train_epochs(
            network,
            len(images),
            measure,
            optimizer or Optimizer(),
            Phase("the network in pretraining", "lower student.pretraining.optimizer.lr"),
            epochs=epochs,
            batch_size=batch_size,
            order=stream(seed, "order"),
            more=project.parameters(),
        )
    return [epoch.loss for epoch in history]
