"""Are labels randomised as a promise of label privacy says?"""

from __future__ import annotations

import math

import torch
from scipy.stats import binomtest, chisquare  # type: ignore[import-untyped]

from fedkd.privacy.label_dp import keep_probability, randomised
from fedkd.studies.audit.finding import FALSE_ALARM, Finding
from fedkd.studies.audit.membership import clopper_pearson

LABELS = 100_000
"""How many are randomised."""

_PATH = "on randomised labels"


def of_labels(
    claimed: float, classes: int, kept: tuple[int, int] | None = None, *, count: int = LABELS
) -> list[Finding]:
    """Test randomised response.

    Args:
        claimed: Epsilon of a label.
        classes: How many there are.
        kept: Of the labels that a run's clients learnt, how many are the true ones, and all; None
            where they are not known.
        count: How many labels are drawn.
    """
    truth = torch.arange(count) % classes
    first, second = (randomised(truth, classes, claimed) for _ in range(2))
    keeps = keep_probability(claimed, classes)
    alike = keeps**2 + (1 - keeps) ** 2 / (classes - 1)
    alpha = FALSE_ALARM / (3 + (classes > 2) + (kept is not None))
    findings = [
        _share("labels kept", int((first == truth).sum()), count, keeps, alpha,
               "of labels that are randomised anew"),
        _share("drawn anew", int((first == second).sum()), count, alike, alpha,
               "of labels that come out alike in two draws"),
    ]  # fmt: skip
    lies = torch.bincount((first - truth) % classes, minlength=classes)[1:].numpy()
    if classes > 2 and lies.any():
        shares = 100 * lies / lies.sum()
        p = float(chisquare(lies).pvalue)
        findings.append(
            Finding(
                path=_PATH,
                test="lies alike",
                over=f"{int(lies.sum()):,} labels",
                expected=f"{100 / (classes - 1):.3g} % each",
                seen=f"{shares.min():.3g} to {shares.max():.3g} %",
                verdict="refuted" if p < alpha else "consistent",
                text=f"Lies are {'not ' if p < alpha else ''}spread evenly over the other "
                f"{classes - 1} classes (p {p:.2g}).",
            )
        )
    if kept is not None:
        findings.append(
            _share(
                "the run's labels kept", *kept, keeps, alpha, "of the labels that clients learnt"
            )
        )
    own, other = (first[truth == label] == 0 for label in (0, 1))
    # Each one-sided at alpha / 2.
    low = clopper_pearson(int(own.sum()), len(own), alpha)[0]
    high = clopper_pearson(int(other.sum()), len(other), alpha)[1]
    bound = max(0.0, math.log(low / high)) if low > 0 else 0.0
    refuted = bound > claimed
    findings.append(
        Finding(
            path=_PATH,
            test="epsilon",
            over=f"2 x {len(own):,} labels",
            expected=f"at most {claimed:.3g}",
            seen=f"at least {bound:.3f}",
            verdict="refuted" if refuted else "consistent",
            text=f"Whoever guesses a label from what comes out shows that epsilon is at least "
            f"{bound:.2f}; {claimed:.3g} is claimed: {'' if refuted else 'not '}refuted.",
        )
    )
    return findings


def _share(test: str, count: int, total: int, promised: float, alpha: float, what: str) -> Finding:
    """An exact binomial test of a share."""
    p = float(binomtest(count, total, promised).pvalue)
    refuted = p < alpha
    return Finding(
        path=_PATH,
        test=test,
        over=f"{total:,} labels",
        expected=f"{100 * promised:.2f} %",
        seen=f"{100 * count / total:.2f} %",
        verdict="refuted" if refuted else "consistent",
        text=f"{100 * count / total:.2f} % {what}, {100 * promised:.2f} % is right (p {p:.2g}): "
        + ("not as promised." if refuted else "as promised."),
    )
