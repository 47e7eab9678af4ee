"""What a training on noisy labels may be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Method = Literal["acdu", "divide", "coteach", "gmm"]


@dataclass(frozen=True)
class Unlearn:
    """When mistakes are undone, and which; epochs count from 0."""

    start: int = 50
    period: int = 10
    length: int = 4
    current: float = 0.05
    drop: float = 0.20
    temperature: float = 0.05
    batch_size: int = 512

    def first(self) -> int:
        """Epoch of the first selection: the first multiple of the period after the start."""
        return (self.start // self.period + 1) * self.period


@dataclass(frozen=True)
class Mix:
    """How labelled and unlabelled images are learnt together."""

    beta: float = 4.0
    sharpen: float = 0.5
    weight: float = 25.0
    ramp: float = 16.0


@dataclass(frozen=True)
class Noisy:
    """How labels that may be wrong are learnt from.

    Attributes:
        method: `acdu`; `divide` (DivideMix: both networks learn from all images, nothing is
            unlearnt); `coteach` (each learns from the labels that the other calls clean); `gmm`
            (one network that drops what it calls wrong itself).
        warmup: Epochs before labels are judged.
        encoder_from: Epoch from which the encoder of a pretrained partner learns too.
        threshold: Chance of being clean above which a label is used.
        average: Epochs whose losses are averaged before labels are judged.
        prior: Share of clean labels where it is known.
        penalty: Whether the warm-up holds predictions back, for labels confused class by class.
        neighbours: Of each image, to vote for its reference label, and three at least; 0: no
            reference labels. A small shard has fewer (`few_neighbours`).
        trust: Share of confirmed labels above which the shard is learnt plainly, unless `prior`
            is known; 1: never.
        guess_in: Mode of the networks while they name the targets.
        answer: The pair's logits: the `sum`, those of the first network (`a`), or a sum `weighted`
            by how far each agrees with the labels called clean.
        unlearn: As in `Unlearn`; `acdu` only.
        mix: As in `Mix`.
    """

    method: Method = "acdu"
    warmup: int = 10
    encoder_from: int = 50
    threshold: float = 0.5
    average: int = 1
    prior: float | None = None
    penalty: bool = False
    neighbours: int = 15
    trust: float = 0.6
    guess_in: Literal["eval", "train"] = "eval"
    answer: Literal["sum", "a", "weighted"] = "sum"
    unlearn: Unlearn = field(default_factory=Unlearn)
    mix: Mix = field(default_factory=Mix)

    @property
    def unlearns(self) -> bool:
        """Whether mistakes are undone."""
        return self.method == "acdu"

    @property
    def alone(self) -> bool:
        """Whether there is no second network."""
        return self.method == "gmm"

    def check(self, epochs: int, said: str) -> None:
        """Refuse a schedule in which a phase never begins.

        Args:
            epochs: Of the whole training.
            said: Where that number comes from, for the message.

        Raises:
            ValueError: one line that begins with the option.
        """
        if self.warmup >= epochs:
            raise ValueError(
                f"warmup: labels are judged after {self.warmup} epochs, the training has {said}; "
                "set a smaller warmup"
            )
        if not self.unlearns:
            return
        unlearn, first = self.unlearn, self.unlearn.first()
        if first >= epochs - 1:
            raise ValueError(
                f"unlearn.start: nothing is ever unlearnt: the first selection after epoch "
                f"{unlearn.start} is in epoch {first} (a multiple of unlearn.period), the last "
                f"epoch is none, and the training has {said}; set unlearn.start and unlearn.period "
                "to less"
            )
        if first - self.warmup < unlearn.period:
            raise ValueError(
                f"unlearn.start: the first selection, in epoch {first}, compares losses "
                f"{unlearn.period} epochs apart, which are followed since epoch {self.warmup} "
                f"(warmup); set unlearn.start to {self.warmup + unlearn.period} or more"
            )
        if unlearn.length > unlearn.period:
            raise ValueError(
                f"unlearn.length: {unlearn.length} epochs do not fit into unlearn.period "
                f"{unlearn.period}"
            )
