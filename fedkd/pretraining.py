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
from fedkd.optimization import make_optimizer, steps_per_epoch
from fedkd.randomness import seeded, stream

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
        Mean loss of each epoch.

    Raises:
        ValueError: the network has no classification layer whose input could be read.
    """
    device = network.mean.device
    width = extract(network, images[:1], (Pooled(),))[Pooled()].shape[1]
    batch = min(batch_size, len(images))
    steps = steps_per_epoch(len(images), batch)
    with seeded(seed, "projection"):
        project = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    project.to(device)
    parameters = [*network.parameters(), *project.parameters()]
    options = optimizer or Optimizer()
    update, schedule = make_optimizer(parameters, options, steps * epochs)
    order = stream(seed, "order")
    network.train()
    history = []
    with seeded(seed, "pretrain"):
        for epoch in range(epochs):
            losses = []
            for step, index in enumerate(torch.randperm(len(images), generator=order).split(batch)):
                if len(index) == 1:
                    continue
                here = images[index].to(device)
                first, second = (
                    project(
                        network.read(augment_batch(here, augment, seed, view, epoch, step)).pooled
                    )
                    for view in ("first", "second")
                )
                loss = contrastive_loss(first, second)
                update.zero_grad(set_to_none=True)
                loss.backward()
                update.step()
                schedule.step()
                losses.append(float(loss.detach()))
            history.append(sum(losses) / len(losses))
    network.eval()
    return history
