"""Are the noisy steps of DP-SGD those that the promise counts? Thousands of tiny trainings.

A broken mechanism rarely shows in what an attacker finds in a trained teacher. Here the images are
chosen so that it does: black ones, which have no gradient, with and without a single white one,
whose gradient is a thousand clipping norms long. They are trained on by the function that trains a
run's teachers, with the run's sampling rate, noise and clipping norm.

References:
    Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023,
    https://arxiv.org/abs/2302.07956
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import binomtest, norm  # type: ignore[import-untyped]
from torch import Tensor

from fedkd.config import ConfigError
from fedkd.privacy.accounting import Accountant, Steps, epsilon
from fedkd.privacy.dp_sgd import Mechanism
from fedkd.privacy.noise_check import SIDE, Noise, direction, noise_of, pictures, trained
from fedkd.rounds import Notify, silent
from fedkd.studies.audit.finding import FALSE_ALARM, Finding
from fedkd.studies.audit.membership import clopper_pearson
from fedkd.studies.audit.promise import Claim

TRAININGS = 1000
"""With the white picture, and as many without it."""

STEPS = 10
"""Most steps of each of the many trainings."""

ALL_STEPS = 2000
"""Most steps of the few trainings that only the noise is looked at of."""

# Black pictures in an average step: where batches are clipped as a whole, they lift the white one.
_COMPANY = 32
_SIDE = 8
_CHUNK = 50
_FEW = 4  # long trainings
_ROUNDING = 1e-3
_QUIET = 1e-3  # a noise multiplier: noise there is, but it hides nothing


def of_dp_sgd(
    mechanism: Mechanism,
    rounds: int,
    *,
    together: bool,
    delta: float,
    accountant: Accountant = "prv",
    trainings: int = TRAININGS,
    notify: Notify = silent,
) -> tuple[Claim, list[Finding]]:
    """Test DP-SGD.

    Args:
        mechanism: Of one round.
        rounds: How many there are.
        together: Whether clients are also trained together.
        delta: Of the claim.
        accountant: Whose claim.
        trainings: Of each kind.
        notify: Receives how many are done.

    Returns:
        What is claimed of the steps that the many trainings take, and what the tests found.
    """
    if mechanism.noise_multiplier == 0:
        raise ConfigError("--noise-multiplier: expected more than 0: without noise nothing is kept")
    every = mechanism.steps * rounds
    short = replace(mechanism, steps=min(every, STEPS))
    spent = epsilon(
        [Steps(short.sample_rate, short.noise_multiplier, short.steps)], delta, accountant
    )
    claim = Claim(spent, delta)
    paths = {"one by one": False, **({"together": True} if together else {})}
    more = every > short.steps
    alpha = FALSE_ALARM / (len(paths) * (5 + more))
    quiet, few = replace(short, noise_multiplier=_QUIET), max(trainings // 5, _CHUNK)
    findings: list[Finding] = []
    done, along = 0, direction(_SIDE)

    def work(note: str, by: int) -> None:
        nonlocal done
        notify("teacher", done=done, total=len(paths) * (2 * trainings + few), note=note)
        done += by

    def many(path: str, mechanism: Mechanism, white: int, count: int) -> Tensor:
        black = min(math.ceil(_COMPANY / mechanism.sample_rate), 5000)
        shard, parts = pictures(black, white, _SIDE), []
        for start in range(0, count, _CHUNK):
            some = min(_CHUNK, count - start)
            work(path, some)
            parts.append(trained(mechanism, shard, some, together=paths[path]))
        return torch.cat(parts)

    for path, beside in paths.items():
        outside = many(path, short, 0, trainings)
        inside = (many(path, short, 1, trainings) @ along).numpy()
        seen = noise_of(outside, short.noise_multiplier * math.sqrt(short.steps))
        findings.append(_noise(path, seen, trainings, f"{short.steps} steps", alpha))
        if more:
            work(f"{path}, all steps", 0)
            findings.append(_long(path, mechanism, rounds, beside, alpha))
        scores = (outside @ along).numpy()
        findings += _exact(path, (many(path, quiet, 1, few) @ along).numpy(), quiet, alpha)
        findings.append(_shift(path, inside, scores, short, alpha))
        findings.append(_epsilon(path, inside, scores, claim, short.steps, alpha))
    return claim, findings


def _long(path: str, mechanism: Mechanism, rounds: int, together: bool, alpha: float) -> Finding:
    """The noise of all steps, round after round."""
    steps = min(mechanism.steps, ALL_STEPS)
    used = max(1, min(rounds, ALL_STEPS // steps))
    moved = trained(
        replace(mechanism, steps=steps), pictures(3, 0, SIDE), _FEW, together=together, rounds=used
    )
    seen = noise_of(moved, mechanism.noise_multiplier * math.sqrt(steps * used))
    every = "all" if (steps, used) == (mechanism.steps, rounds) else "the first"
    return _noise(path, seen, _FEW, f"{every} {steps * used:,} steps", alpha)


def _noise(path: str, seen: Noise, trainings: int, steps: str, alpha: float) -> Finding:
    refuted = seen.p < alpha
    if not refuted:
        words = "as promised"
    elif seen.alike and abs(seen.ratio - 1) < 0.1:
        words = "but it is the same in several trainings: whoever knows it takes it away"
    else:
        words = f"which is not as promised ({'less' if seen.ratio < 1 else 'more'})"
    return Finding(
        path=path,
        test="noise",
        over=f"{trainings:,} x {steps}",
        expected="1",
        seen=f"{seen.ratio:.4f}",
        verdict="refuted" if refuted else "consistent",
        text=f"Clients trained {path}: the noise in {trainings:,} trainings of {steps} has "
        f"{seen.ratio:.3f} of the promised deviation (p {seen.p:.2g}), {words}.",
    )


def _exact(path: str, moved: np.ndarray, mechanism: Mechanism, alpha: float) -> list[Finding]:
    """How far one image moves a training, and how often it takes part: noise hides nothing."""
    steps, rate, total = mechanism.steps, mechanism.sample_rate, len(moved) * mechanism.steps
    largest = float(moved.max())
    limit = steps * (1 + _ROUNDING) + _QUIET * math.sqrt(steps) * float(
        norm.isf(alpha / len(moved))
    )
    beyond = largest > limit
    taken = int(np.clip(np.rint(moved), 0, steps).sum())
    p = float(binomtest(taken, total, rate).pvalue)
    # A quarter of a step is no number of steps: clipping is broken, and there is nothing to count.
    whole = bool((np.abs(moved - np.rint(moved)) < 0.25).all()) and not beyond
    wrong = whole and p < alpha
    return [
        Finding(
            path=path,
            test="sensitivity",
            over=f"{len(moved):,} x {steps} steps",
            expected=f"at most {steps}",
            seen=f"{largest:.3f}",
            verdict="refuted" if beyond else "consistent",
            text=f"Clients trained {path}: in {steps} steps (and hardly any noise) one image moves "
            f"a teacher by {largest:.4g} clipping norms at most, where clipping allows {steps}: "
            + ("it does not hold." if beyond else "it holds."),
        ),
        Finding(
            path=path,
            test="sampling rate",
            over=f"{total:,} draws",
            expected=f"{100 * rate:.2f} %",
            seen=f"{100 * taken / total:.2f} %" if whole else "no whole draws",
            verdict="refuted" if wrong else "consistent" if whole else "no power",
            text=f"Clients trained {path}: the image takes part in {100 * taken / total:.2f} % of "
            f"{total:,} draws, {100 * rate:.2f} % are accounted for (p {p:.2g}): "
            + ("not as promised." if wrong else "as promised.")
            if whole
            else f"Clients trained {path}: how often an image takes part cannot be counted where "
            "clipping does not hold.",
        ),
    ]


def _shift(
    path: str, inside: np.ndarray, outside: np.ndarray, mechanism: Mechanism, alpha: float
) -> Finding:
    allowed = mechanism.sample_rate * mechanism.steps
    shift = float(inside.mean() - outside.mean())
    error = math.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
    limit = allowed * (1 + _ROUNDING) + float(norm.isf(alpha)) * error
    refuted = shift > limit
    return Finding(
        path=path,
        test="mean shift",
        over=f"2 x {len(inside):,} x {mechanism.steps} steps",
        expected=f"at most {allowed:.4g}",
        seen=f"{shift:.4g} ± {error:.2g}",
        verdict="refuted" if refuted else "consistent",
        text=f"Clients trained {path}: under the run's noise one image moves {mechanism.steps} "
        f"steps by {shift:.3g} ± {error:.2g} clipping norms on average, {allowed:.3g} are "
        f"accounted for: {'more than that' if refuted else f'visible from {limit:.3g} on'}.",
    )


def _epsilon(
    path: str, inside: np.ndarray, outside: np.ndarray, claim: Claim, steps: int, alpha: float
) -> Finding:
    bound, largest = told_apart(inside, outside, claim.delta, alpha)
    verdict = "consistent" if largest > claim.epsilon else "no power"
    words = {
        "refuted": "refuted",
        "consistent": "not refuted",
        "no power": f"beyond what these trainings can show, {largest:.2f}; take more --trainings",
    }
    if bound > claim.epsilon:
        verdict = "refuted"
    return Finding(
        path=path,
        test="epsilon",
        over=f"2 x {len(inside):,} x {steps} steps",
        expected=f"at most {claim.epsilon:.3g}",
        seen=f"at least {bound:.2f}",
        verdict=verdict,
        text=f"Clients trained {path}: guesses whether an image was there show an epsilon of at "
        f"least {bound:.2f}; for {steps} steps {claim.epsilon:.3g} is claimed (delta "
        f"{claim.delta:g}): {words[verdict]}.",
    )


def told_apart(
    inside: np.ndarray, outside: np.ndarray, delta: float, alpha: float
) -> tuple[float, float]:
    """Lower bound on epsilon from a threshold on scores, and the largest that could come out.

    The threshold is chosen on a quarter of the scores, the errors counted on the others.

    Args:
        inside: Scores of trainings with the image, which are higher.
        outside: Of trainings without.
        delta: Of the claim.
        alpha: Chance that the bound is wrong.
    """

    def bound(missed: int, of: int, accused: int, others: int) -> float:
        # Each one-sided at alpha / 2.
        false_negative = clopper_pearson(missed, of, alpha)[1]
        false_positive = clopper_pearson(accused, others, alpha)[1]
        tries = [
            (1 - false_negative - delta, false_positive),
            (1 - false_positive - delta, false_negative),
        ]
        return max([0.0, *(math.log(over / under) for over, under in tries if over > 0)])

    def at(threshold: float, a: np.ndarray, b: np.ndarray) -> float:
        return bound(int((a <= threshold).sum()), len(a), int((b > threshold).sum()), len(b))

    first, second = len(inside) // 4, len(outside) // 4
    thresholds = np.unique(np.quantile(np.concatenate([inside[:first], outside[:second]]),
                                       np.linspace(0, 1, 101)))  # fmt: skip
    best = max(thresholds, key=lambda t: at(t, inside[:first], outside[:second]))
    rest = inside[first:], outside[second:]
    return at(float(best), *rest), bound(0, len(rest[0]), 0, len(rest[1]))
