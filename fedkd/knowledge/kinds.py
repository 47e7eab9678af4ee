"""Every kind of knowledge about the transfer set that may leave a client, in one file.

A kind is a small frozen value used as the key of its tensor. Options are part of the key, and
`str(kind)` is its name on the wire. Each docstring names what the kind discloses. Most kinds are
about every sample; a `TeacherStatistic` is about the teacher, once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedkd.functional.density_ratio import Features, density_ratio
from fedkd.functional.feature_statistics import (
    cell_statistics,
    class_maps,
    spatial_moments,
    spectral_norms,
)
from fedkd.functional.similarity import alignment_costs, angle_costs
from fedkd.models.network import Network, Outputs


class Reading:
    """One network on one batch, with lazy cached forwards: nobody pays for what nobody asked.

    Args:
        network: The network to read.
        real: uint8 images (B, channels, h, w).
        virtual: View number -> the same images under that virtual view; called at most once
            per view.
    """

    def __init__(
        self, network: Network, real: Tensor, virtual: Callable[[int], Tensor] | None = None
    ) -> None:
        self.network = network
        self._real = real
        self._virtual = virtual
        self._views: dict[int, Outputs] = {}

    @cached_property
    def real(self) -> Outputs:
        """Outputs on the real images."""
        return self.network.read(self._real)

    def view(self, number: int) -> Outputs:
        """Outputs on virtual view `number`."""
        if number not in self._views:
            if self._virtual is None:
                raise RuntimeError("this reading has no virtual views")
            self._views[number] = self.network.read(self._virtual(number))
        return self._views[number]


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of knowledge; subclasses are final.

    Attributes:
        per_sample: Whether the first axis is the sample; else the kind is a `TeacherStatistic`.
        fusible: Whether fusion rules see it: the same small shape from every teacher.
        logits: Whether its last axis are logits, of which only differences mean anything.
        of_maps: Whether it is made of feature maps, whose places two modalities do not share.
        by_class: Whether it has an axis of the teacher's classes.
    """

    per_sample: ClassVar[bool] = True
    fusible: ClassVar[bool] = False
    logits: ClassVar[bool] = False
    of_maps: ClassVar[bool] = False
    by_class: ClassVar[bool] = False

    @abstractmethod
    def read(self, reading: Reading) -> Tensor:
        """The tensor of this kind for one batch, first axis = sample.

        Raises:
            ValueError: the network has no such thing (an MLP has no feature maps).
        """

    def __str__(self) -> str:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{name}({options})" if options else name


@dataclass(frozen=True)
class TeacherStatistic(Kind, ABC):
    """Something that holds for a teacher and not for a sample; sent once per round."""

    per_sample: ClassVar[bool] = False

    def read(self, reading: Reading) -> Tensor:
        """A fact is not read from a batch."""
        raise RuntimeError(f"{self} is a fact about a network, not about a batch")

    @abstractmethod
    def state(self, network: Network, images: Tensor, labels: Tensor | None) -> Tensor:
        """The fact.

        Args:
            network: In evaluation mode.
            images: uint8 (N, channels, h, w): the transfer set, or a central training set.
            labels: Their classes (N,); None takes the network's own predictions.
        """


@dataclass(frozen=True)
class DataStatistic(Kind, ABC):
    """Something of each transfer image that a client finds by looking at its own images.

    Training its network privately does not protect it.
    """

    def read(self, reading: Reading) -> Tensor:
        """A comparison is not read from a network."""
        raise RuntimeError(f"{self} is about a client's images, not about its network")

    @abstractmethod
    def compare(self, images: Tensor, own: Tensor) -> Tensor:
        """(N, ...) for `images` uint8 (N, channels, h, w), given the client's `own` (P, ...)."""


@dataclass(frozen=True)
class Logits(Kind):
    """Logits of the real image, (B, C).

    Discloses the teacher's full prediction on every transfer image. The relation graphs of the
    real view (inter-sample, inter-class) are functions of it, so they cost no extra bytes.
    """

    fusible: ClassVar[bool] = True
    logits: ClassVar[bool] = True
    by_class: ClassVar[bool] = True

    def read(self, reading: Reading) -> Tensor:
        """(B, C)."""
        return reading.real.logits


@dataclass(frozen=True)
class VirtualLogits(Kind):
    """Logits of one virtual view of the image, (B, C).

    Discloses the prediction on an augmented copy that every machine makes for itself from run
    seed, sample index and view. With `Logits` it determines the virtual relation graphs.
    """

    fusible: ClassVar[bool] = True
    logits: ClassVar[bool] = True
    by_class: ClassVar[bool] = True

    view: int = 0

    def read(self, reading: Reading) -> Tensor:
        """(B, C)."""
        return reading.view(self.view).logits


@dataclass(frozen=True)
class Pooled(Kind):
    """The vector that enters the classifier, (B, D).

    Discloses the teacher's embedding of every transfer image, which shows more of how it sees
    images than its logits do.
    """

    def read(self, reading: Reading) -> Tensor:
        """(B, D)."""
        pooled = reading.real.pooled
        if pooled is None:
            raise ValueError(
                "it has no linear layer whose output is the logits, so no input of one"
            )
        return pooled


@dataclass(frozen=True)
class Stage(Kind):
    """The feature map at the end of one stage, (B, D, h, w).

    Discloses everything the teacher has computed up to there, at 20 to 150 times the image's own
    bytes; meant for teachers on the server.

    Attributes:
        index: Which of the network's stages; -1 is the deepest.
    """

    of_maps: ClassVar[bool] = True

    index: int = -1

    def read(self, reading: Reading) -> Tensor:
        """(B, D, h, w)."""
        return _stage(reading, self.index)


@dataclass(frozen=True)
class ClassMaps(Kind):
    """Class activation maps averaged to a grid, (B, C, size, size).

    Discloses where in every transfer image the teacher sees evidence for each class; the mean
    over places is the logit less the classifier's bias.

    Attributes:
        size: Side of the grid; None keeps the map's own.
    """

    of_maps: ClassVar[bool] = True
    by_class: ClassVar[bool] = True

    size: int | None = 2

    def read(self, reading: Reading) -> Tensor:
        """(B, C, size, size)."""
        final, head = reading.real.final, reading.network.head
        if final is None or head is None or head.in_features != final.shape[1]:
            raise ValueError(
                "it has no feature map whose mean enters a linear layer that gives the logits"
            )
        return class_maps(final, head.weight, self.size)


@dataclass(frozen=True)
class FeatureStatistics(Kind):
    """Mean and deviation of each channel in each cell of a grid, (B, 2, D, grid, grid).

    Discloses how strongly and how unevenly each channel answers, by coarse place.

    Attributes:
        stage: Which stage's map.
        grid: Cells per side; 1 takes the whole map.
    """

    of_maps: ClassVar[bool] = True

    stage: int = -1
    grid: int = 1

    def read(self, reading: Reading) -> Tensor:
        """(B, 2, D, grid, grid)."""
        return cell_statistics(_stage(reading, self.stage), self.grid)


@dataclass(frozen=True)
class FeatureMoments(Kind):
    """Mean and full covariance of the channels over places, (B, D + 1, D); row 0 is the mean.

    Discloses which channels answer together.

    Attributes:
        stage: Which stage's map.
    """

    of_maps: ClassVar[bool] = True

    stage: int = -1

    def read(self, reading: Reading) -> Tensor:
        """(B, D + 1, D)."""
        return spatial_moments(_stage(reading, self.stage))


@dataclass(frozen=True)
class SpectralNorms(Kind):
    """How much each stage stretches its input, (B, stages - 1): 4 bytes a number.

    Discloses one number per pair of neighbouring stages.

    Attributes:
        stages: How many of the deepest stages.
        iterations: Steps of the power iteration.
    """

    of_maps: ClassVar[bool] = True

    stages: int = 3
    iterations: int = 20

    def read(self, reading: Reading) -> Tensor:
        """(B, stages - 1)."""
        maps = [_stage(reading, index) for index in range(-self.stages, 0)]
        return spectral_norms(maps, iterations=self.iterations)


@dataclass(frozen=True)
class DensityRatio(DataStatistic):
    """How much likelier the image is among the client's own images than in the transfer set, (B,).

    Discloses one number per transfer image about the client's images themselves: which public
    images its data resemble, hence roughly which classes it holds. It shows nothing of how well
    the teacher has learnt, and stays the same as long as the client's images do.

    Attributes:
        components: Principal components of the transfer images in which likeness is measured.
        bandwidth: Of the kernel, in medians of the transfer images' distances.
        features: In what images are compared.
        root: What is sent is this root of the ratio: most ratios are far below the largest, and a
            codec of few bits spaces its numbers evenly.
    """

    fusible: ClassVar[bool] = True

    components: int = 50
    bandwidth: float = 0.35
    features: Features = "pixels"
    root: int = 1

    def compare(self, images: Tensor, own: Tensor) -> Tensor:
        """(N,): the root of the ratio at `images` (N, ...), from the client's `own` (P, ...)."""
        ratios = density_ratio(
            images,
            own,
            components=self.components,
            bandwidth=self.bandwidth,
            features=self.features,
        )
        return ratios if self.root == 1 else ratios ** (1 / self.root)

    def ratios(self, sent: Tensor) -> Tensor:
        """The density ratios, not negative, of what was sent."""
        sent = sent.clamp(min=0)
        return sent if self.root == 1 else sent**self.root


@dataclass(frozen=True)
class ClassCosts(TeacherStatistic):
    """How unlike the classes are to the teacher, (C, C): 0 on the diagonal, up to 2.

    Discloses the geometry of its classes.

    Attributes:
        source: `classifier` (angles between the classifier's weights; needs no images),
            `features` (1 - CKA between the deepest maps of the classes' images, as published on
            CIFAR) or `logits` (the same of their logits, as published on ImageNet).
    """

    by_class: ClassVar[bool] = True

    source: Literal["classifier", "features", "logits"] = "classifier"

    def state(self, network: Network, images: Tensor, labels: Tensor | None) -> Tensor:
        """(C, C)."""
        if self.source == "classifier":
            return angle_costs(_head(network).weight)
        answers, seen = [], []
        for batch in images.split(256):
            outputs = network.read(batch.to(network.mean.device))
            if self.source == "features":
                # Every place of the map is one observation, as in the published matrices.
                answers.append(_last(outputs.stages).flatten(2).transpose(1, 2).cpu())
            else:
                answers.append(outputs.logits[:, None].cpu())
            seen.append(outputs.logits.argmax(dim=1).cpu())
        classes = outputs.logits.shape[1]
        labels = torch.cat(seen) if labels is None else labels.cpu()
        return alignment_costs(torch.cat(answers), labels, classes)


@dataclass(frozen=True)
class Classifier(TeacherStatistic):
    """Weights of the linear classifier and, in the last column, its bias, (C, D + 1).

    Discloses the classifier; with `Pooled` or `Stage` it gives the teacher's logits, also for
    features that are not its own.
    """

    by_class: ClassVar[bool] = True

    def state(self, network: Network, images: Tensor, labels: Tensor | None) -> Tensor:
        """(C, D + 1)."""
        head = _head(network)
        weight = head.weight.detach()
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()
        return torch.cat([weight, bias[:, None]], dim=1)


def _head(network: Network) -> nn.Linear:
    if network.head is None:
        raise ValueError("it has no linear layer whose output is the logits")
    return network.head


def _stage(reading: Reading, index: int) -> Tensor:
    stages = reading.real.stages
    if not -len(stages) <= index < len(stages):
        raise ValueError(f"it has {len(stages)} stages, stage {index} was asked for")
    return stages[index]


def _last(stages: tuple[Tensor, ...]) -> Tensor:
    if not stages:
        raise ValueError("it has no feature maps")
    return stages[-1]
