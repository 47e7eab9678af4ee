"""The contract of a baseline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedkd.rounds import ExperimentContext


@dataclass(frozen=True)
class RoundResult:
    """What one round of a method came to.

    Attributes:
        round: From 1.
        accuracy: On the public test set, in [0, 1]: of the server's model; of the clients' models
            on average where a method has none (`Baseline.has_student` is False).
        per_class: Accuracy per class, None for classes without test images.
        ece: Expected calibration error, in [0, 1].
        up: Bytes from all clients in this round, as Flower serialises the messages.
        down: Bytes to all clients.
        seconds: Wall-clock seconds.
    """

    round: int
    accuracy: float
    per_class: list[float | None]
    ece: float
    up: int
    down: int
    seconds: float


OnRound = Callable[[RoundResult], None]


@dataclass(frozen=True)
class Outcome:
    """A finished method.

    Attributes:
        rounds: In order.
        holdouts: Accuracy of the final model on each client's held-out private images; None for
            a client that has none.
        predictions: Final logits on the public test set, (N, C), or None if there is no single
            model.
        uses_transfer: Whether clients need the transfer set.
        teachers: Mean test accuracy of the clients' networks in the last round, if it was measured.
        epsilon: What the run spent at most per client, if it promised anything.
        kept: The round whose model counts; None: the last.
    """

    rounds: tuple[RoundResult, ...]
    holdouts: tuple[float | None, ...]
    predictions: Tensor | None = None
    uses_transfer: bool = True
    teachers: float | None = None
    epsilon: float | None = None
    kept: int | None = None


class Baseline(ABC):
    """One method of the field, run in one process on an experiment's data.

    Everything it shares with fedkd comes from the experiment: split, seed, networks, local
    training, number of rounds, the student's optimiser.

    Attributes:
        has_student: Whether the server ends up with a model of its own.
        crosses_modalities: Whether clients may see something else than the server's model: what
            they share is about samples, and neither weights nor images.
    """

    has_student: bool = True
    crosses_modalities: bool = False

    @abstractmethod
    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds; `on_round` hears of each as it ends."""
