"""Teachers count by how often they are right on labelled images of the server."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.knowledge.payload import Ensemble


def labelled(evidence: FitContext, rule: str) -> tuple[list[Ensemble], Tensor]:
    """Batches of labelled images and their classes: the server's own, or a labelled transfer set.

    Raises:
        ValueError: there are neither.
    """
    if evidence.validation is not None and evidence.validation_labels is not None:
        return [e for _, e in evidence.validation_batches()], evidence.validation_labels
    if evidence.labels is not None:
        return [e for _, e in evidence.batches()], evidence.labels
    raise ValueError(
        f"fusion {rule!r} learns from labelled images of the server: set data.validation, or "
        "data.transfer.labelled if the transfer set has labels"
    )


@FUSIONS.register("validation_accuracy")
class ValidationAccuracy(Fusion):
    """A teacher's say grows with its accuracy above chance, class by class if asked.

    Args:
        power: Larger values listen to the best only.
        per_class: A teacher's say on a sample is its accuracy on the classes that the teachers
            together take the sample for.
    """

    needs_validation = True

    def __init__(self, *, power: float = 2.0, per_class: bool = False) -> None:
        if power < 0:
            raise ValueError(
                f"fusion 'validation_accuracy': power must not be negative, got {power}"
            )
        self.power = power
        self.per_class = per_class
        self.scores: Tensor | None = None  # (M, C)

    def fitted(self, evidence: FitContext) -> Self:
        """Accuracies. Raises `ValueError` without labelled images."""
        batches, labels = labelled(evidence, "validation_accuracy")
        logits = torch.cat([batch.logits for batch in batches], dim=1)
        classes = logits.shape[-1]
        right = (logits.argmax(dim=-1) == labels).float()  # (M, V)
        members = one_hot(labels, classes).float()
        if self.per_class:
            # One example more of each class, answered at chance: rare classes prove little.
            scores = (right @ members + 1 / classes) / (members.sum(dim=0) + 1)
        else:
            scores = right.mean(dim=1, keepdim=True).expand(-1, classes)
        ready = copy(self)
        ready.scores = ((scores - 1 / classes) / (1 - 1 / classes)).clamp(min=0).pow(self.power)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by accuracy."""
        if self.scores is None:
            raise RuntimeError("fusion 'validation_accuracy' has to be fitted: use fit_rules")
        scores = self.scores.to(ensemble.weights)
        if not self.per_class:
            return ensemble.weighted(scores[:, :1])
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        belief = torch.einsum("mb,mc,mbc->bc", ensemble.weights, scores, probabilities)
        belief = belief / belief.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        return ensemble.weighted(torch.einsum("mc,bc->mb", scores, belief))
