"""Who is looked at: a network, several weighed as one, or answers that were kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.models.network import Network
from fedkd.models.taps import evaluating

BATCH = 512


class NotMeasured(ValueError):
    """A property cannot be measured here; the message says why."""


class Reader(ABC):
    """Answers about images, in evaluation mode. Compared by identity: answers are kept for each.

    Attributes:
        name: As people call it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Logits (B, C) on the CPU, with a gradient where `images` has one.

        Args:
            images: uint8 or floats in [0, 1].
            rows: Which of the measured images each one was made of, (B,) or (B, several).

        Raises:
            NotMeasured: it cannot be asked.
        """

    @abstractmethod
    def pooled(self, images: Tensor) -> Tensor:
        """What enters the classifier, (N, D). Raises `NotMeasured`."""

    @abstractmethod
    def maps(self, images: Tensor, labels: Tensor) -> Tensor:
        """Grad-CAM of a class for each image, (N, h, w), not negative. Raises `NotMeasured`."""

    @property
    def members(self) -> Sequence[Reader]:
        """Those whose answers it weighs; none if it answers by itself."""
        return ()


class Single(Reader):
    """One network."""

    def __init__(self, name: str, network: Network) -> None:
        super().__init__(name)
        self.network = network

    def logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Its logits."""
        grad = torch.is_grad_enabled() and images.requires_grad
        with evaluating(self.network), torch.set_grad_enabled(grad):
            logits: Tensor = self.network(images.to(self.network.mean.device))
        return logits.float().cpu()

    def pooled(self, images: Tensor) -> Tensor:
        """Its pooled features."""
        parts = []
        with evaluating(self.network):
            for batch in self._batches(images):
                found = self.network.read(batch).pooled
                if found is None:
                    raise NotMeasured(
                        f"{self.name} has no linear layer whose output is the logits, so no "
                        "features that enter one"
                    )
                parts.append(found.float().cpu())
        return torch.cat(parts)

    def maps(self, images: Tensor, labels: Tensor) -> Tensor:
        """Grad-CAM at the last map.

        Where the mean of that map enters a linear classifier (patches of a transformer, most
        convolutional networks) the gradient is the classifier's weight; else it is computed.
        """
        parts = []
        for batch, own in zip(self._batches(images), labels.split(BATCH), strict=True):
            target = own.to(self.network.mean.device)
            parts.append(self._closed(batch, target))
        found = torch.cat(parts)
        if found.shape[1] * found.shape[2] == 1:
            raise NotMeasured(f"the last map of {self.name} has a single place")
        return found

    def _closed(self, batch: Tensor, labels: Tensor) -> Tensor:
        with evaluating(self.network):
            outputs, head = self.network.read(batch), self.network.head
        final = outputs.final
        if final is not None and head is not None and head.in_features == final.shape[1]:
            slopes = head.weight.detach()[labels] / (final.shape[2] * final.shape[3])
            return _weighed(final, slopes)
        if not outputs.stages or outputs.stages[-1].dim() != 4:
            raise NotMeasured(f"{self.name} has no last map: its features have no places")
        with evaluating(self.network), torch.enable_grad():
            pixels = batch.float().div(255) if batch.dtype == torch.uint8 else batch.float()
            outputs = self.network.read(pixels.requires_grad_())
            last = outputs.stages[-1]
            chosen = outputs.logits.gather(1, labels[:, None]).sum()
            (slope,) = torch.autograd.grad(chosen, [last], allow_unused=True)
        if slope is None:
            raise NotMeasured(f"the logits of {self.name} do not depend on its last map")
        return _weighed(last, slope.mean(dim=(2, 3)))

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        device = self.network.mean.device
        return (batch.to(device) for batch in images.split(BATCH))


def _weighed(maps: Tensor, slopes: Tensor) -> Tensor:
    """relu of the channels' weighted sum, (B, D, h, w) x (B, D) -> (B, h, w) on the CPU."""
    return torch.einsum("bdhw,bd->bhw", maps, slopes).relu().detach().float().cpu()


class Weighed(Reader):
    """Several networks, whose probabilities are averaged as the run's fusion weighs them.

    The weights are those of each image as it is; what is made of it (shifted, cropped, attacked)
    keeps them, and a mixture of several images has their mean. So gradients exist, and the rules
    are not asked about images that they were not made for.

    Args:
        name: As people call it.
        members: The networks.
        weights: Of each on each measured image, (M, N); None: all alike.
    """

    def __init__(self, name: str, members: Sequence[Single], weights: Tensor | None = None) -> None:
        super().__init__(name)
        self._members = tuple(members)
        self._weights = weights

    @property
    def members(self) -> Sequence[Single]:
        """The networks."""
        return self._members

    def weights(self, rows: Tensor) -> Tensor:
        """(M, B)."""
        if self._weights is None:
            count = len(self._members)
            return torch.full((count, len(rows)), 1 / count)
        found = self._weights[:, rows]
        return found if rows.dim() == 1 else found.mean(dim=2)

    def together(self, logits: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Logarithm of the weighed mean of the members' probabilities, (B, C)."""
        who = tuple(Teacher(number) for number in range(len(logits)))
        ensemble = Ensemble(who, {Logits(): torch.stack(list(logits))}, self.weights(rows))
        return ensemble.mean_probabilities().clamp(min=1e-12).log()

    def logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """As `together`."""
        return self.together([member.logits(images, rows) for member in self._members], rows)

    def pooled(self, images: Tensor) -> Tensor:
        """The members' features side by side, each member's of the same size in all."""
        parts = []
        for member in self._members:
            centred = (own := member.pooled(images)) - own.mean(dim=0)
            parts.append(centred / centred.norm().clamp(min=1e-12))
        return torch.cat(parts, dim=1)

    def maps(self, images: Tensor, labels: Tensor) -> Tensor:
        """The weighed mean of the maps, of unit length, of those members that have some."""
        rows = torch.arange(len(images))
        found, reason = [], NotMeasured(f"{self.name} has no maps")
        for member, weights in zip(self._members, self.weights(rows), strict=True):
            try:
                found.append((member.maps(images, labels), weights))
            except NotMeasured as error:
                reason = error
        if not found:
            raise reason
        side = min(maps.shape[1] for maps, _ in found)
        return torch.stack([w[:, None, None] * unit(resized(m, side)) for m, w in found]).sum(0)


class Kept(Reader):
    """Answers that were kept, about the images as they are: all that a client on a node gave.

    Args:
        name: As people call it.
        answers: Logits (N, C).
        why: Why it cannot be asked about others.
    """

    def __init__(self, name: str, answers: Tensor, why: str) -> None:
        super().__init__(name)
        self.answers = answers
        self._why = why

    def logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Only what was kept."""
        raise NotMeasured(self._why)

    def pooled(self, images: Tensor) -> Tensor:
        """Was not kept."""
        raise NotMeasured(self._why)

    def maps(self, images: Tensor, labels: Tensor) -> Tensor:
        """Were not kept."""
        raise NotMeasured(self._why)


def resized(maps: Tensor, side: int) -> Tensor:
    """Averaged to a smaller square, (N, h, w) -> (N, side, side)."""
    if maps.shape[1:] == (side, side):
        return maps
    return functional.adaptive_avg_pool2d(maps[:, None], side)[:, 0]


def unit(maps: Tensor) -> Tensor:
    """Each map of length one; one of zeros stays."""
    flat: Tensor = functional.normalize(maps.flatten(1), dim=1, eps=1e-12)
    return flat.view_as(maps)
