"""The contract of a mechanism at the aggregator."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.gaussian import mu_of

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


@dataclass(frozen=True, kw_only=True)
class Secure:
    """Options of a release that sums securely; all of them are public.

    Args:
        missing: Clients of those asked without which a sum is still made.
        colluding: Clients who may tell the server their own noise without the promise breaking.
        repeats: Sums in the whole run that may be asked for again after a client failed between
            its key and its votes. Each is paid for, used or not.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    missing: int = 0
    colluding: int = 0
    repeats: int = 0

    def __post_init__(self) -> None:
        for name in ("missing", "colluding", "repeats"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"secure.{name} must be at least 0, got {value}")

    def least(self, asked: int) -> int:
        """How many clients a sum needs, of so many that are asked."""
        return asked - self.missing

    def honest(self, asked: int) -> int:
        """How many of them add noise that nobody else knows."""
        return asked - self.missing - self.colluding

    def check(self, asked: int) -> None:
        """Raises `ValueError`: fewer than two clients would be left to hide among."""
        if self.honest(asked) < 2:
            raise ValueError(
                f"secure: of {asked} clients {self.missing} may miss and {self.colluding} collude, "
                "which leaves fewer than 2 to hide among: lower missing or colluding"
            )


@dataclass(kw_only=True, eq=False)
class Release(ABC):
    """Noise on what all teachers answer together; the rest is thrown away.

    The server sees every teacher's answers and is trusted with them, unless the clients sum
    securely. Protected against everybody else (the other clients, whoever gets the student or the
    report; with `secure` the server too) is one unit: an `example` of a client (it can change one
    teacher's answers, all of them), or a `client` as a whole. A teacher trained on either changes
    by replacing it, so the two cost the same here.

    The budget holds for the whole run: the noise is set once, for all rounds.

    Args:
        epsilon: Of the whole run.
        delta: Of the whole run.
        queries: Transfer images asked about in each round, drawn from the run's seed; None asks
            about all of them. Fewer need less noise.
        cells: Instead of images, ask about so many cells of alike transfer images, and let out each
            cell's answer for all of its images; `auto` takes as many as clients and budget bear.
        unit: What is protected; named in the statement.
        secure: Clients add the noise and mask their answers, so that the server sees the noisy sum
            alone: `{missing: 3, colluding: 3, repeats: 1}`, see `Secure`. None trusts the server.
    """

    #: Whether the mechanism needs nothing of the answers but one noisy sum, so that clients can
    #: make it: then it has `contributions` and `scores`.
    additive: ClassVar[bool] = False

    #: How far one teacher's answer to one image can move the sum, in L2 norm (replaced).
    sensitivity: ClassVar[float] = math.sqrt(2)

    # Not postponed in this module: subclasses elsewhere inherit these fields with their types.
    epsilon: float
    delta: float = 1e-5
    queries: int | None = None
    cells: int | Literal["auto"] | None = None
    unit: Unit = "example"
    secure: Secure | None = None

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
        if self.secure is not None and not self.additive:
            raise ValueError(
                "release: secure needs a mechanism that takes one noisy sum of the answers (gnmax, "
                "prob_sum); this one looks at them several times"
            )

    def budget(self) -> float:
        """The whole run's mu."""
        return mu_of(self.epsilon, self.delta)

    def times(self, rounds: int) -> int:
        """How many sums the budget is divided over: one per round, and those that may be repeated.

        A server that asks again could subtract one sum from the other. So each has noise of its
        own and is paid for in full.
        """
        return rounds + (self.secure.repeats if self.secure is not None else 0)

    def deviation(self, queries: int, rounds: int) -> float:
        """Standard deviation of the noise on a number of the sum."""
        return self.sensitivity * math.sqrt(queries * self.times(rounds)) / self.budget()

    def surplus(self, clients: int) -> float:
        """How much wider the noise gets because so many clients add their parts.

        What the promise takes is already there where only the honest ones of the fewest do.
        """
        if self.secure is None:
            return 1.0
        return math.sqrt(clients / self.secure.honest(clients))

    def wider(self, classes: int, step: float) -> float:
        """Factor of the noise that covers the rounding of each answer to multiples of `step`.

        It may move two answers apart by half a step in each entry each.
        """
        return 1 + math.sqrt(classes) * step / self.sensitivity

    def noise_on_votes(self, queries: int, rounds: int, clients: int) -> float:
        """Standard deviation of the noise on an answer, for people. Raises `ValueError` if not one
        round fits the budget.
        """
        return self.deviation(queries, rounds) * self.surplus(clients)

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
        bear = self.budget() * clients / (3 * math.sqrt(self.times(rounds)) * self.surplus(clients))
        bear = round(bear)
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

    def contributions(self, probabilities: Tensor) -> Tensor:
        """What each teacher's answers add to the sum, (…, K, C) -> float64 of the same shape."""
        raise NotImplementedError

    def scores(self, noisy: Tensor, teachers: int) -> Tensor:
        """What is let out of a noisy sum over so many teachers, (K, C) -> probabilities."""
        raise NotImplementedError


def noisy_sum(total: Tensor, deviation: float, noise: SecureGenerator) -> Tensor:
    """`total`, rounded to multiples of `GRID`, plus Gaussian noise on the same grid, float64."""
    if total.numel() == 0:
        return total.double()
    drawn = noise.discrete_gaussian(tuple(total.shape), deviation / GRID)
    return ((total.double() / GRID).round().long() + drawn).double() * GRID
