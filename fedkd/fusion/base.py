"""The contract of a fusion rule."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fedkd.knowledge.payload import Ensemble


class Fusion(ABC):
    """One rule that decides what many teachers say together: `Ensemble -> Ensemble`.

    Rules chain: each sees what the one before it left. A rule sees every sample on its own (its
    result must not depend on which other samples are in the ensemble) and keeps the columns of
    `weights` summing to one.

    Attributes:
        discloses: Metadata the rule needs from clients: `num_examples`, `class_counts`.
    """

    discloses: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Reweight or merge the teachers."""
