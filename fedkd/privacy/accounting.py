"""What releases cost together: a few mechanisms, Opacus' accountants, one epsilon."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

from fedkd.io.extras import extra

Accountant = Literal["rdp", "prv", "gaussian"]

# Beyond this epsilon the PRV accountant's grid fills the memory, and nobody needs its precision.
_PRV_UP_TO = 100.0


@dataclass(frozen=True)
class Steps:
    """Some steps of the Poisson-subsampled Gaussian mechanism (DP-SGD).

    Attributes:
        sample_rate: Probability with which an example takes part; 1 is the plain Gaussian.
        noise_multiplier: Noise in units of what one example may change.
        count: How many.
    """

    sample_rate: float
    noise_multiplier: float
    count: int

    @classmethod
    def gaussian(cls, mu: float) -> Self:
        """One release under Gaussian noise that costs so much, without sampling."""
        return cls(1.0, 1 / mu, 1)

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate: expected more than 0 and at most 1: {self.sample_rate}")
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier: expected more than 0: {self.noise_multiplier}")
        if self.count < 0:
            raise ValueError(f"count: expected at least 0: {self.count}")


def epsilon(releases: Iterable[Steps], delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon of all releases about the same example, in any order.

    Args:
        releases: May differ in rate and noise.
        delta: Of the whole.
        accountant: `rdp` (Renyi; milliseconds, an upper bound some percents too high), `prv`
            (numerical; up to a second, tight; beyond an epsilon of 100 it is `rdp` all the same) or
            `gaussian` (exact where all steps are at rate 1; `prv` where some are not).

    Raises:
        ValueError: another accountant: the Gaussian-limit one (`gdp`) underestimates.

    References:
        Mironov, "Renyi Differential Privacy", 2017, https://arxiv.org/abs/1702.07476
        Gopi et al., "Numerical Composition of Differential Privacy", NeurIPS 2021,
            https://arxiv.org/abs/2106.02848
    """
    if accountant not in ("rdp", "prv", "gaussian"):
        raise ValueError(f"accountant: expected rdp, prv or gaussian, got {accountant!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected between 0 and 1, got {delta}")
    grouped: dict[tuple[float, float], int] = {}
    for steps in releases:
        key = (steps.sample_rate, steps.noise_multiplier)
        grouped[key] = grouped.get(key, 0) + steps.count
    history = tuple(sorted((*key, count) for key, count in grouped.items() if count > 0))
    if accountant == "gaussian":
        if all(rate == 1 for rate, _, _ in history):
            from fedkd.privacy.release.gaussian import epsilon_of

            return epsilon_of(math.sqrt(sum(n / noise**2 for _, noise, n in history)), delta)
        accountant = "prv"
    return _epsilon(history, delta, accountant) if history else 0.0


@lru_cache(maxsize=4096)
def _epsilon(
    history: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant
) -> float:
    with extra("privacy", "privacy accounting"):
        from opacus.accountants import PRVAccountant, RDPAccountant

    def of(counter: RDPAccountant | PRVAccountant) -> float:
        counter.history = [(noise, rate, count) for rate, noise, count in history]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of alphas at the end of their range
            return float(counter.get_epsilon(delta=delta))

    bound = of(RDPAccountant())
    if accountant == "rdp" or not bound <= _PRV_UP_TO:
        return bound
    return min(bound, of(PRVAccountant()))


def noise_for(
    target: float, delta: float, sample_rate: float, count: int, accountant: Accountant = "rdp"
) -> float:
    """Smallest noise multiplier (to thousandths) with which `count` steps stay within `target`.

    Raises:
        ValueError: no noise below 10,000 does.
    """
    if not (target > 0 and math.isfinite(target)):
        raise ValueError(f"epsilon: expected more than 0 and finite, got {target}")

    def cost(noise: float) -> float:
        return epsilon([Steps(sample_rate, noise, count)], delta, accountant)

    low, high = 0.05, 1.0
    if accountant == "prv":  # each cost takes a while, so it begins near the end
        low, high = _bracket(cost, target, _limit_noise(target, delta, sample_rate, count))
    while cost(high) > target:
        low, high = high, high * 2
        if high > 1e4:
            raise ValueError(
                f"epsilon {target} at delta {delta} is out of reach with {count} steps at rate "
                f"{sample_rate:.3g}: take fewer steps, or a larger delta"
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high  # of the two the one whose cost was seen to be within the target


def _limit_noise(target: float, delta: float, sample_rate: float, count: int) -> float:
    """About the noise that is looked for, by the limit of many small steps; no bound."""
    from fedkd.privacy.release.gaussian import mu_of

    mu = mu_of(target, delta)
    return 1 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / count))


def _bracket(cost: Callable[[float], float], target: float, noise: float) -> tuple[float, float]:
    """Too little noise and enough of it, close together; epsilon falls about as one over noise."""
    low, high, slope = 0.05, math.inf, -1.0
    last: tuple[float, float] | None = None
    for _ in range(8):
        noise = min(max(noise, low), 1e4)
        spent = cost(noise)
        low, high = (noise, high) if spent > target else (low, min(noise, high))
        if target * 0.998 <= spent <= target or not math.isfinite(spent):
            break
        here = math.log(noise), math.log(spent)
        if last is not None and here[0] != last[0]:
            slope = min(max((here[1] - last[1]) / (here[0] - last[0]), -4.0), -0.3)
        last = here
        noise = math.exp(here[0] + (math.log(target * 0.999) - here[1]) / slope)
    if high < math.inf and spent <= target and spent >= target * 0.998:
        low = max(low, high * (1 - 1e-3))
    return low, min(high, max(2 * low, 1.0))


def together(history: Sequence[Steps]) -> str:
    """For people: `200 steps at rate 0.1, noise 1.2`."""
    return "; ".join(
        f"{s.count} steps at rate {s.sample_rate:.4g}, noise {s.noise_multiplier:.4g}"
        for s in history
    )
