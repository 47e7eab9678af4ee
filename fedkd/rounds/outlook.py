"""What a run promises and how much noise that takes, from public facts, before it is run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.config import Experiment
from fedkd.data.cohorts import how_many
from fedkd.privacy.accounting import Accountant, Steps, epsilon
from fedkd.privacy.plan import plan
from fedkd.privacy.release.gaussian import epsilon_of
from fedkd.rounds.context import experiment_context


@dataclass(frozen=True)
class Outlook:
    """Of one run: the same for all clients.

    Attributes:
        mechanism: As the config names it.
        asked: What a round does, in words.
        noise: Standard deviation of the noise on one number of a sum.
        signal: The most that all those who add to the sum can come to: an expected batch of clipped
            gradients, the votes of all clients.
        rounds: In how many rounds a client can be asked; how many secure sums are paid for.
        delta: Of the promise.
        mu: Of a release: of the whole run, as Gaussian differential privacy.
        steps: Of DP-SGD: those of one round.
        accountant: Which counts them.
        each: What `rounds` counts: "round" or "sum".
    """

    mechanism: str
    asked: str
    noise: float
    signal: float
    rounds: int
    delta: float
    mu: float = 0.0
    steps: Steps | None = None
    accountant: Accountant = "rdp"
    each: str = "round"

    @property
    def ratio(self) -> float:
        """Noise over signal."""
        return self.noise / self.signal

    def spent(self, rounds: int) -> float:
        """Epsilon of the first rounds."""
        if self.steps is None:
            return epsilon_of(self.mu * math.sqrt(rounds / self.rounds), self.delta)
        count = self.steps.count * rounds
        steps = Steps(self.steps.sample_rate, self.steps.noise_multiplier, count)
        return epsilon([steps], self.delta, self.accountant)


def outlook(experiment: Experiment) -> Outlook | None:
    """None where nothing is promised, or where labels are randomised once for all rounds.

    Raises:
        ConfigError: the promise cannot be kept, or is none.
    """
    if experiment.release is not None:
        return _of_release(experiment)
    planned = plan(experiment)
    if planned is None:
        return None
    privacy, steps, mechanism = experiment.teachers.privacy, planned.steps, planned.mechanism
    assert privacy is not None
    return Outlook(
        mechanism=privacy.mechanism,
        asked=f"{steps.count} steps at rate {steps.sample_rate:.3g}",
        noise=steps.noise_multiplier,
        signal=mechanism.expected_batch_size,
        rounds=planned.rounds,
        delta=planned.delta,
        steps=steps,
        accountant=privacy.accountant,
    )


def _of_release(experiment: Experiment) -> Outlook:
    context = experiment_context(experiment)
    release = context.release
    assert release is not None
    assert experiment.release is not None
    images, what = len(context.data.transfer.images), "images"
    count = images if release.queries is None else min(release.queries, images)
    if context.cells is not None:
        count, what = context.cells, "cells"
    sums = release.times(experiment.rounds)
    return Outlook(
        mechanism=experiment.release.name,
        asked=f"{count} {what}" + (f", {sums} sums in all" if sums > experiment.rounds else ""),
        noise=release.noise_on_votes(count, experiment.rounds, asked_clients(experiment)),
        signal=asked_clients(experiment),
        rounds=sums,
        delta=release.delta,
        mu=release.budget(),
        each="round" if release.secure is None else "sum",
    )


def asked_clients(experiment: Experiment) -> int:
    """How many clients a round asks."""
    return how_many(experiment.federation.participation.ask, experiment.clients)


def together(runs: Sequence[Outlook]) -> tuple[float, float]:
    """Epsilon and delta of all these runs on the same images.

    Composed at the largest of their deltas: releases alone exactly, together with DP-SGD by the
    Renyi accountant, as Gaussian mechanisms of rate 1.
    """
    history: Counter[tuple[float, float]] = Counter()
    for run in runs:
        if run.steps is None:
            history[1.0, 1 / run.mu] += 1
        else:
            rate = run.steps.sample_rate, run.steps.noise_multiplier
            history[rate] += run.steps.count * run.rounds
    delta = max(run.delta for run in runs)
    accountant: Accountant = "gaussian" if all(rate == 1 for rate, _ in history) else "rdp"
    steps = [Steps(rate, noise, count) for (rate, noise), count in history.items()]
    return epsilon(steps, delta, accountant), delta


def several(runs: Sequence[Outlook]) -> str:
    """`45 runs on the same images are 45 promises: ...`; empty for fewer than two."""
    if len(runs) < 2:
        return ""
    spent, delta = together(runs)
    return (
        f"{len(runs)} private runs on the same images are {len(runs)} promises: to somebody who "
        f"sees all of them, they are one of epsilon {spent:.3g} at delta {delta:.2g}"
    )
