"""What a network can learn of images before it sees a label: which two views are of one image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.data.views import MIRRORING, Draws, augmented
from fedkd.models.network import Network
from fedkd.randomness import seeded, stream
from fedkd.training.loop import Measured, Phase, train_epochs
from fedkd.training.numerics import numerics
from fedkd.training.optimizers import DEFAULT_OPTIMIZER, Optimizer

PARTNER = Phase("the partner's pretraining", "lower the learning rate")
TEMPERATURE = 0.5


def contrast_loss(first: Tensor, second: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent of two views of the same images, (B, D) x (B, D) -> (2B,).

    References:
        Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
            ICML 2020, https://arxiv.org/abs/2002.05709
    """
    rows = functional.normalize(torch.cat([first, second]), dim=1)
    alike = rows @ rows.T / temperature
    alike = alike.masked_fill(
        torch.eye(len(rows), dtype=torch.bool, device=rows.device), -torch.inf
    )
    other = torch.arange(len(rows), device=rows.device).roll(len(first))
    return functional.cross_entropy(alike, other, reduction="none")


def pretrain(
    network: Network,
    images: Tensor,
    *,
    epochs: int = 20,
    batch_size: int = 16,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    augment: str = "none",
    seed: int,
) -> None:
    """Train all of a network but its head (in place) on unlabelled images.

    Args:
        network: One whose head is entered by features.
        images: uint8 (N, channels, h, w).
        epochs: Passes over them.
        batch_size: Images per step.
        optimizer: Optimiser and schedule.
        augment: Recipe of labelled training: if it mirrors, views are mirrored too.
        seed: Of everything drawn.

    Raises:
        ValueError: the network has no features, or there are fewer than two images.
        RuntimeError: loss or weights are not finite.
    """
    device = network.mean.device
    images, recipe = images.to(device), "randaugment"
    if augment in MIRRORING:
        recipe = "randaugment_flip"
    if len(images) < 2:
        raise ValueError(f"contrasts need two images at least, there are {len(images)}")
    with torch.no_grad():
        pooled = network.eval().read(images[:1]).pooled
    if pooled is None:
        raise ValueError("a network without features cannot be pretrained by contrasts")
    width, draws = pooled.shape[1], Draws(seed, device)
    with seeded(seed, "contrast"):
        projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    learner = _Contrasted(network, projection.to(device))

    def measure(epoch: int, step: int, index: Tensor) -> Measured:
        views = [
            augmented(images[index], recipe, draws.of(epoch, step, "contrast", view))
            for view in (1, 2)
        ]
        first, second = learner(torch.cat(views)).chunk(2)
        return Measured(contrast_loss(first, second).mean(), len(index))

    with numerics(device, "float32"), seeded(seed, "pretraining"):
        train_epochs(
            learner,
            len(images),
            measure,
            optimizer,
            PARTNER,
            epochs=epochs,
            batch_size=max(batch_size, 2),
            order=stream(seed, "pretraining order"),
        )


class _Contrasted(nn.Module):
    """A network's features, projected to where they are compared; its head stays as it is."""

    def __init__(self, network: Network, projection: nn.Module) -> None:
        super().__init__()
        self.network, self.projection = network, projection

    def forward(self, images: Tensor) -> Tensor:
        """(B, D)."""
        pooled = self.network.read(images).pooled
        assert pooled is not None
        projected: Tensor = self.projection(pooled)
        return projected
