"""How well classes are found where some are rare, and accuracy praises who never names them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedkd.training.evaluation import per_class_accuracy

SPECIFICITY = 0.95
UNEVEN = 2.0  # times as many images of one class as of another


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What predictions are worth whatever the shares of the classes.

    Of two classes the rarer one is to be found; of more, each against all others, and the numbers
    are means over the classes that occur. None where no class can be told from another.

    Attributes:
        balanced_accuracy: Mean of the accuracies within the classes.
        auc: Probability that an image of the class is ranked above one that is not.
        sensitivity: Share of its images that is found where 95 % of the others are left alone.
    """

    balanced_accuracy: float
    auc: float | None = None
    sensitivity: float | None = None

    @classmethod
    def of(cls, predictions: Tensor, labels: Tensor) -> Detection | None:
        """Of logits (N, C) against labels (N,); None without any. Raises as `accuracy`."""
        if len(labels) == 0:
            return None
        within = torch.tensor(per_class_accuracy(predictions, labels), dtype=torch.double)
        scores = torch.softmax(predictions.double(), dim=1)
        counts = torch.bincount(labels, minlength=scores.shape[1])
        wanted = [c for c in range(len(counts)) if 0 < counts[c] < len(labels)]
        if len(counts) == 2 and wanted:
            wanted = [0 if counts[0] < counts[1] else 1]
        pairs = [(scores[labels == c, c], scores[labels != c, c]) for c in wanted]
        areas = [area(positive, negative) for positive, negative in pairs]
        found = [sensitivity(positive, negative) for positive, negative in pairs]
        return cls(
            balanced_accuracy=float(within.nanmean()),
            auc=sum(areas) / len(areas) if areas else None,
            sensitivity=sum(found) / len(found) if found else None,
        )


def uneven(labels: Tensor) -> bool:
    """Whether the most frequent class has at least twice as many images as the rarest one."""
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    return len(counts) > 1 and bool(counts.max() >= UNEVEN * counts.min())


def area(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve of scores; ties count half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, side="left")
    upto = torch.searchsorted(ordered, positive, side="right")
    return float((below + upto).double().mean() / (2 * len(negative)))


def sensitivity(positive: Tensor, negative: Tensor, specificity: float = SPECIFICITY) -> float:
    """Share of positives above the threshold that leaves so many of the negatives alone."""
    # As many negatives as may lie above it; ties are no help.
    above = int((1 - specificity) * len(negative) + 1e-9)
    threshold = negative.sort(descending=True).values[above]
    return float((positive > threshold).double().mean())
