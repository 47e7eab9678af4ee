"""The contract of a mechanism at the aggregator."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.gaussian import epsilon_of, mu_of

# Sums are rounded to multiples of this, and so is their noise: whole numbers of it are added, which
# give away nothing but their sum. So fine that discrete noise costs what continuous noise does, to
# more digits than the accounting has.
GRID = 2.0**-20

Unit = Literal["example", "client"]


@dataclass(frozen=True)
class Released:
    """What came out.

    Attributes:
        scores: (K, C) for the K transfer images that were answered: probabilities, rows sum to 1.
        index: Which images those are, (K,), ascending.
        mu: What the release cost, as mu of Gaussian differential privacy.
    """

    scores: Tensor
    index: Tensor
    mu: float


@dataclass(kw_only=True, eq=False)
class Release(ABC):
    """Noise on what all teachers answer together; the rest is thrown away.

    The server sees every teacher's answers and is trusted with them. Protected against everybody
    else (the other clients, whoever gets the student or the report) is one unit: an `example`
    of a client (it can change one teacher's answers, all of them), or a `client` as a whole. A
    teacher trained on either changes by replacing it, so the two cost the same here.

    The budget holds for the whole run: the noise is set once, for all rounds.

    Args:
        epsilon: Of the whole run.
        delta: Of the whole run.
        queries: Transfer images asked about in each round, drawn from the run's seed; None asks
            about all of them. Fewer need less noise.
        cells: Instead of images, ask about so many cells of alike transfer images, and let out each
            cell's answer for all of its images; `auto` takes as many as clients and budget bear.
        unit: What is protected; named in the statement.
    """

    #: How far one teacher's answer to one image can move the sum, in L2 norm (replaced).
    sensitivity: ClassVar[float] = math.sqrt(2)

    # Not postponed in this module: subclasses elsewhere inherit these fields with their types.
    epsilon: float
    delta: float = 1e-5
    queries: int | None = None
    cells: int | Literal["auto"] | None = None
    unit: Unit = "example"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"release: epsilon must be positive and finite, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"release: delta must lie between 0 and 1, got {self.delta}")
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"release: queries must be at least 1, got {self.queries}")
        if self.cells is not None and self.queries is not None:
            raise ValueError(
                "release: queries and cells both say how much is asked about; leave one out"
            )
        if isinstance(self.cells, int) and self.cells < 2:
            raise ValueError(f"release: cells must be at least 2, got {self.cells}")
        if self.unit not in ("example", "client"):
            raise ValueError(f"release: unit is 'example' or 'client', got {self.unit!r}")

    def budget(self) -> float:
        """The whole run's mu."""
        return mu_of(self.epsilon, self.delta)

    def deviation(self, queries: int, rounds: int) -> float:
        """Standard deviation of the noise on a number of the sum."""
        return self.sensitivity * math.sqrt(queries * rounds) / self.budget()

    def noise_on_votes(self, queries: int, rounds: int, clients: int) -> float:
        """Standard deviation of the noise on an answer, for people. Raises `ValueError` if not one
        round fits the budget.
        """
        return self.deviation(queries, rounds)

    def asked(self, total: int, generator: torch.Generator) -> Tensor:
        """Which of `total` transfer images are asked about, ascending. Public."""
        count = total if self.queries is None else min(self.queries, total)
        return torch.randperm(total, generator=generator)[:count].sort().values

    def how_many_cells(self, clients: int, rounds: int, classes: int, images: int) -> int:
        """K, from public facts.

        With many cells the noise drowns the votes, with few a cell holds several classes. The rule
        for `auto` is the one that the best K followed on digits and Fashion-MNIST
        (docs/privacy.md).
        """
        if isinstance(self.cells, int):
            return self.cells
        bear = round(self.budget() * clients / (3 * math.sqrt(rounds)))
        return min(max(bear, classes, 2), images)

    @abstractmethod
    def __call__(
        self, probabilities: Tensor, index: Tensor, rounds: int, noise: SecureGenerator
    ) -> Released:
        """Answer.

        Args:
            probabilities: The teachers' answers about the images, (M, K, C).
            index: Those images, (K,).
            rounds: Rounds in the whole run.
            noise: Keyed by the operating system, never by the run: who knows the seed knows the
                noise.
        """

    def statement(self, mu: float) -> str:
        """What is claimed after spending `mu` in all, in a sentence."""
        what = "one training example of one client" if self.unit == "example" else "one client"
        return (
            f"everything that left the server is ({epsilon_of(mu, self.delta):.3g}, "
            f"{self.delta:g})-differentially private with respect to replacing {what}; the server "
            "itself is trusted"
        )


def noisy_sum(total: Tensor, deviation: float, noise: SecureGenerator) -> Tensor:
    """`total`, rounded to multiples of `GRID`, plus Gaussian noise on the same grid, float64."""
    if total.numel() == 0:
        return total.double()
    drawn = noise.discrete_gaussian(tuple(total.shape), deviation / GRID)
    return ((total.double() / GRID).round().long() + drawn).double() * GRID
