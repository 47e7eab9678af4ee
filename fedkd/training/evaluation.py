"""How good predictions are: accuracy, per class, calibration, agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedkd.knowledge.extract import extract, extract_many
from fedkd.knowledge.kinds import Logits
from fedkd.models.arguments import a_network, fitting, image_set
from fedkd.models.network import Network


def predict(network: Network, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """Logits (N, C) on the CPU, in evaluation mode; batches as in `extract`."""
    return extract(network, images, (Logits(),), batch_size=batch_size)[Logits()]


def predict_many(
    networks: Sequence[Network], images: Tensor, *, together: bool | None = None
) -> Tensor:
    """Logits (K, N, C) of many networks; `together` as in `extract_many`."""
    read = extract_many(networks, images, (Logits(),), together=together)
    return torch.stack([tensors[Logits()] for tensors in read])


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of rows of `predictions` (N, C) whose argmax is the label; NaN if N is 0.

    Raises:
        ValueError: a prediction is NaN, which is no answer at all.
    """
    if len(labels) == 0:
        return float("nan")
    return float((_winners(predictions) == labels).double().mean())


def _winners(predictions: Tensor) -> Tensor:
    bad = int(predictions.isnan().any(dim=1).sum())
    if bad:
        raise ValueError(
            f"predictions: {bad} of {len(predictions)} rows are NaN; look at the network's weights"
        )
    return predictions.argmax(dim=1)


def evaluate(network: Network, images: Any) -> float:
    """Accuracy of a network on a labelled set, or whatever `ImageSet.from_dataset` takes.

    Raises:
        ValueError: the set is empty or has no labels, or the network is made for other images or
            another number of classes.
    """
    a_network("network", network, "images")
    images = image_set("images", images, labelled=True)
    labels = images.labels
    assert labels is not None
    fitting("network", network, images, "images")
    return accuracy(predict(network, images.images), labels)


def per_class_accuracy(predictions: Tensor, labels: Tensor) -> list[float]:
    """Accuracy within each class, NaN for a class without samples. Raises as `accuracy`."""
    right = (_winners(predictions) == labels).double()
    classes = predictions.shape[1]
    hits = torch.zeros(classes, dtype=torch.double).index_add_(0, labels, right)
    counts = torch.bincount(labels, minlength=classes).double()
    return (hits / counts.where(counts > 0, torch.nan)).tolist()


@dataclass(frozen=True)
class Calibration:
    """Reliability of the winning probability, in equal-width bins of confidence.

    Attributes:
        ece: Expected calibration error (Guo et al. 2017), in [0, 1].
        confidence: Mean confidence per bin (NaN where empty).
        accuracy: Accuracy per bin (NaN where empty).
        counts: Samples per bin.
    """

    ece: float
    confidence: list[float]
    accuracy: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What predictions are worth against labels.

    Attributes:
        accuracy: In [0, 1].
        per_class: The same within each class (NaN for a class without samples).
        calibration: How far their confidence can be believed.
    """

    accuracy: float
    per_class: list[float] = field(default_factory=list)
    calibration: Calibration | None = None

    @classmethod
    def of(cls, predictions: Tensor, labels: Tensor) -> Scores:
        """Scores of logits (N, C) against labels (N,). Raises as `accuracy`."""
        return cls(
            accuracy=accuracy(predictions, labels),
            per_class=per_class_accuracy(predictions, labels),
            calibration=calibration(predictions, labels),
        )


def calibration(predictions: Tensor, labels: Tensor, *, bins: int = 15) -> Calibration:
    """Calibration of logits (N, C) against labels (N,). Raises as `accuracy`."""
    _winners(predictions)
    confidence, winner = torch.softmax(predictions.double(), dim=1).max(dim=1)
    right = (winner == labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(place, minlength=bins).double()
    zero = torch.zeros(bins, dtype=torch.double)
    mean_confidence = zero.index_add(0, place, confidence) / counts
    mean_accuracy = zero.index_add(0, place, right) / counts
    gap = (mean_confidence - mean_accuracy).abs().nan_to_num()
    return Calibration(
        ece=float((gap * counts).sum() / counts.sum()),
        confidence=mean_confidence.tolist(),
        accuracy=mean_accuracy.tolist(),
        counts=[int(n) for n in counts],
    )


_SCALES = (0.05, 20.0)


def best_temperature(predictions: Tensor, labels: Tensor) -> float:
    """The number that logits (N, C) are divided by so that labels (N,) become most likely.

    Accuracy does not change by it. Within bounds, which count where all answers are right.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
            https://arxiv.org/abs/1706.04599
    """
    logits = predictions.double()

    def loss(exponent: float) -> float:
        scaled = logits * math.exp(-exponent)
        return float(torch.nn.functional.cross_entropy(scaled, labels))

    low, high = map(math.log, _SCALES)
    golden = (math.sqrt(5) - 1) / 2  # convex in the inverse temperature: a single valley
    for _ in range(40):
        first, second = high - golden * (high - low), low + golden * (high - low)
        if loss(first) < loss(second):
            high = second
        else:
            low = first
    return math.exp((low + high) / 2)


def agreement(predictions: list[Tensor]) -> Tensor:
    """Share of samples on which each pair of predictors names the same class, (M, M)."""
    names = torch.stack([_winners(p) for p in predictions])
    return (names[:, None, :] == names[None, :, :]).double().mean(dim=2)
