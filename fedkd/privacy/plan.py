"""What every client does about its privacy, worked out from the public config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fedkd.config import ConfigError, Experiment, Privacy
from fedkd.data.cohorts import Sampler, most_rounds
from fedkd.privacy.accounting import Steps, epsilon, noise_for
from fedkd.privacy.dp_sgd import Mechanism


@dataclass(frozen=True)
class Plan:
    """The same for all clients and all rounds.

    Attributes:
        mechanism: Of one round.
        rounds: How many rounds the budget was divided over.
        epsilon: Promise for the whole run.
        delta: Likewise.
    """

    mechanism: Mechanism
    rounds: int
    epsilon: float
    delta: float

    @property
    def steps(self) -> Steps:
        """What one round costs."""
        m = self.mechanism
        return Steps(m.sample_rate, m.noise_multiplier, m.steps)


def plan(experiment: Experiment) -> Plan | None:
    """The plan of an experiment with DP-SGD teachers, None for any other.

    The noise is set once, for all rounds that a client can be asked in. That only a part of the
    clients is drawn in a round makes nothing cheaper: the draw is no secret (docs/privacy.md).

    Raises:
        ConfigError: the promise cannot be kept, or is none.
    """
    privacy = experiment.teachers.privacy
    if privacy is None or privacy.mechanism != "dp_sgd":
        return None
    assert privacy.nominal_size is not None
    delta = delta_of(privacy)
    teachers = experiment.teachers
    rounds = _rounds(experiment)
    mechanism = Mechanism.of(
        privacy.nominal_size,
        teachers.batch_size,
        teachers.epochs,
        privacy.noise_multiplier or 1.0,
        max_grad_norm=privacy.max_grad_norm,
        clipping=privacy.clipping,
    )
    count = mechanism.steps * rounds
    try:
        if privacy.noise_multiplier is None:
            assert privacy.epsilon is not None
            noise = noise_for(
                privacy.epsilon, delta, mechanism.sample_rate, count, privacy.accountant
            )
            mechanism = Mechanism(**{**vars(mechanism), "noise_multiplier": noise})
        promised = privacy.epsilon
        if promised is None:
            steps = Steps(mechanism.sample_rate, mechanism.noise_multiplier, count)
            promised = epsilon([steps], delta, privacy.accountant)
        once = Steps(mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps)
        single = epsilon([once], delta, privacy.accountant)
        if single > promised * (1 + 1e-9):
            raise ValueError(
                f"a single round costs epsilon {single:.4g}, more than the budget of {promised:g}: "
                "no teacher could ever be trained; raise noise_multiplier or epsilon"
            )
    except ValueError as error:
        raise ConfigError(f"teachers.privacy: {error}") from None
    return Plan(mechanism, rounds, promised, delta)


def _rounds(experiment: Experiment) -> int:
    """In how many rounds a client can be asked at most: fewer than the run has in fixed cohorts."""
    sampler = experiment.federation.participation.sampler
    try:
        return most_rounds(
            Sampler.of(sampler.name, sampler.options),
            clients=experiment.clients,
            rounds=experiment.rounds,
            seed=experiment.seed,
        )
    except ValueError as error:
        raise ConfigError(f"federation.participation.sampler: {error}") from None


def delta_of(privacy: Privacy) -> float:
    """The config's delta; by default a power of ten, at most a tenth of one over the shard's size.

    Raises:
        ConfigError: a delta with which a whole image might be published.
    """
    size = privacy.nominal_size or 1
    if privacy.delta is None:
        return float(10.0 ** math.floor(math.log10(0.1 / size)))
    if privacy.delta >= 1 / size:
        raise ConfigError(
            f"teachers.privacy.delta: {privacy.delta:g} is not below 1 / nominal_size "
            f"({1 / size:.3g}): it would allow to publish an image now and then"
        )
    return privacy.delta


@dataclass(frozen=True)
class Proposal:
    """DP-SGD for small shards: a linear classifier on public features, a few whole-shard steps.

    Attributes:
        epsilon: Promise for the whole run.
        delta: Likewise.
        nominal_size: Public size of a shard; a batch is all of it.
        directions: Of the model `linear`.
        steps: In each round.
    """

    epsilon: float
    delta: float
    nominal_size: int
    directions: int
    steps: int

    @classmethod
    def of(cls, nominal_size: int, epsilon: float, delta: float | None = None) -> Proposal:
        """From public facts alone, by what was best on digits and Fashion-MNIST (docs/privacy.md).

        What can be read goes with the images times the budget, as mu of the Gaussian mechanism:
        directions with its root, steps (and their length) with itself.

        Raises:
            ConfigError: a delta with which a whole image might be published.
        """
        from fedkd.privacy.release.gaussian import mu_of

        privacy = Privacy(epsilon=epsilon, delta=delta, nominal_size=nominal_size)
        delta = delta_of(privacy)
        readable = nominal_size * mu_of(epsilon, delta)
        steps = min(max(round(readable / 50), 5), 20)
        return cls(epsilon, delta, nominal_size, max(4, round(1.2 * math.sqrt(readable))), steps)

    @property
    def teachers(self) -> dict[str, Any]:
        """The section `teachers` of a config."""
        return {
            "models": [{"name": "linear", "directions": self.directions}],
            "privacy": {
                "epsilon": self.epsilon,
                "delta": self.delta,
                "nominal_size": self.nominal_size,
                "max_grad_norm": 1.0,
            },
            "epochs": self.steps,
            "batch_size": self.nominal_size,
            "label_smoothing": 0.0,
            "augment": "none",
            "optimizer": {
                "name": "sgd",
                "lr": 2.0 * self.steps,
                "momentum": 0.0,
                "weight_decay": 0.0,
                "schedule": "constant",
            },
        }
