"""A release whose sum the clients make: the server sees it under their noise, and nothing else.

Each client writes its ballots in whole numbers, adds its part of the noise, and hides the result
under masks that cancel in the sum (`fedkd/privacy/masking.py`). Here is what follows from the
config: how much noise, how many clients a sum needs, and what one sum costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.privacy.accounting import Steps
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.base import Release

# Steps in a vote. So many that the discrete noise of a client is thousands of steps wide.
SCALE = 4096
_MODULUS = 2**32
# What the discreteness of the clients' noise may add to the epsilon of a whole run.
_NEGLIGIBLE = 1e-9
# Chance that some number of a sum leaves the range of the modulus: then that answer is wrong.
_WRAPS = 2.0**-40


@dataclass(frozen=True)
class SecureSum:
    """One sum; both ends work it out from public facts.

    Attributes:
        asked: Clients that a round asks.
        least: Fewer are not summed.
        questions: Images or cells.
        classes: Numbers per question.
        deviation: Of one client's noise, in steps of which a vote has `SCALE`.
        mu: What one sum costs, as mu of Gaussian differential privacy.
    """

    asked: int
    least: int
    questions: int
    classes: int
    deviation: int
    mu: float

    @classmethod
    def of(
        cls, release: Release, asked: int, rounds: int, questions: int, classes: int
    ) -> SecureSum:
        """Of a release with `secure`.

        The noise of the fewest honest clients that a sum can have is what the promise takes; the
        others' comes on top.

        Raises:
            ValueError: too few clients, or a budget for which the modulus is too small or the steps
                too coarse.
        """
        secure = release.secure
        assert secure is not None
        secure.check(asked)
        honest, wider = secure.honest(asked), release.wider(classes, 1 / SCALE)
        needed = release.deviation(questions, rounds) * wider * SCALE
        deviation = math.ceil(needed / math.sqrt(honest))
        mu = release.sensitivity * wider * math.sqrt(questions) * SCALE
        mu /= deviation * math.sqrt(honest)
        found = cls(asked, secure.least(asked), questions, classes, deviation, mu)
        found._check(rounds + secure.repeats)
        return found

    @property
    def size(self) -> int:
        """Numbers in a sum."""
        return self.questions * self.classes

    @property
    def steps(self) -> Steps:
        """What one sum costs, for a ledger."""
        return Steps.gaussian(self.mu)

    def _check(self, times: int) -> None:
        gap = 2 * closeness(self.deviation, self.asked) * self.size * times
        if gap > _NEGLIGIBLE:
            raise ValueError(
                f"secure: noise of {self.deviation} steps per client is too coarse to be accounted "
                "as Gaussian: lower epsilon"
            )
        spread = self.deviation * math.sqrt(2 * self.asked * math.log(2 * self.size / _WRAPS))
        if self.asked * SCALE + spread >= _MODULUS / 2:
            raise ValueError(
                f"secure: noise of {self.deviation * math.sqrt(self.asked) / SCALE:,.0f} votes may "
                "leave the range of 32 bits: raise epsilon, or ask less (cells, queries)"
            )

    def encoded(self, contributions: Tensor, noise: SecureGenerator | None) -> np.ndarray:
        """A client's ballots under its noise, uint32 (questions * classes,).

        Args:
            contributions: (questions, classes).
            noise: Keyed by the operating system; None adds none (tests).
        """
        steps = (contributions.double() * SCALE).round().long().flatten()
        if steps.numel() != self.size:
            raise ValueError(f"expected {self.size} numbers, got {steps.numel()}")
        if noise is not None:
            steps = steps + noise.discrete_gaussian((self.size,), self.deviation)
        return np.remainder(steps.numpy(), _MODULUS).astype(np.uint32)

    def decoded(self, total: np.ndarray) -> Tensor:
        """The sum of all clients' numbers, in votes, float64 (questions, classes)."""
        votes = torch.from_numpy(total.astype(np.uint32).view(np.int32).astype(np.float64))
        return (votes / SCALE).reshape(self.questions, self.classes)


def closeness(deviation: float, clients: int) -> float:
    """How far a number's noise, summed over clients, is from one discrete Gaussian.

    The logarithms of the two probabilities of any value differ by no more (tau in the paper).

    References:
        Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning
            with Secure Aggregation", ICML 2021, https://arxiv.org/abs/2102.06387, Proposition 14
    """
    if deviation < 0.5:
        return math.inf
    exponent = -2 * (math.pi * deviation) ** 2
    return 10 * sum(math.exp(exponent * k / (k + 1)) for k in range(1, clients))
