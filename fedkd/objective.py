"""Fused teachers x weighted losses: what the student minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Ensemble
from fedkd.losses.base import DistillationLoss, Trust


@dataclass(frozen=True)
class Term:
    """One loss of the objective.

    Attributes:
        name: Its name in logs.
        loss: The loss.
        weight: Its weight at full strength.
        warmup: Epochs over which the weight rises linearly to full; 0 means at once.
    """

    name: str
    loss: DistillationLoss
    weight: float = 1.0
    warmup: int = 0

    def weight_at(self, epoch: int) -> float:
        """Weight in `epoch`, counted from 1 (Zhao et al. 2022 warm DKD up this way)."""
        return self.weight * (min(epoch / self.warmup, 1.0) if self.warmup else 1.0)


class Objective(nn.Module):
    """A weighted sum of losses over all teachers of an ensemble.

    A loss that looks at no teacher (cross entropy on the targets) is counted once; any other is
    summed over the teachers with their weights.

    Raises:
        ValueError: there is no term.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("an objective needs at least one loss")
        self.terms = tuple(terms)
        self.losses = nn.ModuleList(term.loss for term in terms)

    @property
    def needs(self) -> tuple[Kind, ...]:
        """Kinds every teacher must share: the clients' order list."""
        return _union(term.loss.needs for term in self.terms)

    @property
    def reads(self) -> tuple[Kind, ...]:
        """Kinds read from the student."""
        return _union(term.loss.reads for term in self.terms)

    def forward(
        self,
        student: Mapping[Kind, Tensor],
        ensemble: Ensemble,
        targets: Tensor | None,
        epoch: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and each term's unweighted value (detached)."""
        values: dict[str, Tensor] = {}
        total: Tensor | None = None
        for term in self.terms:
            value = self._value(term.loss, student, ensemble, targets)
            values[term.name] = value.detach()
            part = term.weight_at(epoch) * value
            total = part if total is None else total + part
        assert total is not None
        return total, values

    @staticmethod
    def _value(
        loss: DistillationLoss,
        student: Mapping[Kind, Tensor],
        ensemble: Ensemble,
        targets: Tensor | None,
    ) -> Tensor:
        if not loss.needs:
            everyone = ensemble.weights.sum(dim=0)
            return _mean(loss(student, {}, targets, Trust(everyone)), everyone)
        classes = ensemble.class_weights
        parts = []
        for m, weights in enumerate(ensemble.weights):
            trust = Trust(weights, None if classes is None else classes[m])
            parts.append(_mean(loss(student, ensemble.teacher(m), targets, trust), weights))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def _mean(value: Tensor, weights: Tensor) -> Tensor:
    """Reduction, written once: per-sample losses are weighted and averaged, scalars are done."""
    return value if value.ndim == 0 else (value * weights).mean()


def _union(groups: Iterable[tuple[Kind, ...]]) -> tuple[Kind, ...]:
    kinds: dict[Kind, None] = {}
    for group in groups:
        kinds.update(dict.fromkeys(group))
    return tuple(kinds)
