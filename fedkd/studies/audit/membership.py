"""Membership inference: how well scores tell images that were trained on from others.

References:
    Yeom et al., "Privacy Risk in Machine Learning", CSF 2018, https://arxiv.org/abs/1709.01604
    Carlini et al., "Membership Inference Attacks From First Principles" (LiRA), S&P 2022,
    https://arxiv.org/abs/2112.03570
    Watson et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks",
    ICLR 2022, https://arxiv.org/abs/2111.08440
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import beta, norm  # type: ignore[import-untyped]
from torch import Tensor

FALSE_ALARMS = 0.01
"""Share of non-members that may be accused when the true-positive rate is read off."""

_RESAMPLES = 1000


@dataclass(frozen=True)
class Membership:
    """How well an attack did; intervals are at 95 %.

    Attributes:
        auc: Area under the ROC curve; 0.5 is guessing.
        auc_interval: By bootstrap over images.
        tpr: Share of members found while at most 1 % of the others are accused. With fewer than
            100 others that means none of them.
        tpr_interval: Clopper-Pearson, of the members.
        members: Images that were trained on.
        others: Images that were not.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]
    members: int
    others: int

    @property
    def leaks(self) -> bool:
        """The attack is better than guessing beyond what chance explains.

        By the area, or by the members found at few false alarms: an attack that is sure of some
        images and guesses at the rest hardly moves the area. How many false alarms the threshold
        really has is uncertain as well.
        """
        false_alarms = clopper_pearson(int(FALSE_ALARMS * self.others), self.others)
        return self.auc_interval[0] > 0.5 or self.tpr_interval[0] > false_alarms[1]


def confidence(logits: Tensor, labels: Tensor) -> np.ndarray:
    """log p / (1 - p) of the label's probability p, (N, C) x (N,) -> (N,).

    Orders images as the loss does, the other way round, and is close to normal over trainings.
    """
    own = logits.double().gather(1, labels[:, None]).squeeze(1)
    rest = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return (own - rest).numpy()


def membership(
    members: np.ndarray, others: np.ndarray, generator: np.random.Generator
) -> Membership:
    """How well a threshold on a score tells members, who score high, from others.

    Args:
        members: Scores (M,) of images that were trained on.
        others: Scores (K,) of images that were not.
        generator: Of the bootstrap.

    Raises:
        ValueError: one of them is empty.
    """
    if len(members) == 0 or len(others) == 0:
        raise ValueError("membership needs images of both kinds")
    # Ties count half, as in the area under the curve.
    wins = (members[:, None] > others).astype(float) + 0.5 * (members[:, None] == others)
    first = _resampled(len(members), generator)
    second = _resampled(len(others), generator)
    resampled = ((first @ wins) * second).sum(1)
    low, high = np.quantile(resampled, (0.025, 0.975)).clip(0, 1)
    allowed = int(FALSE_ALARMS * len(others))
    found = int((members > np.sort(others)[-1 - allowed]).sum())
    return Membership(
        auc=float(wins.mean()),
        auc_interval=(float(low), float(high)),
        tpr=found / len(members),
        tpr_interval=clopper_pearson(found, len(members)),
        members=len(members),
        others=len(others),
    )


def clopper_pearson(count: int, total: int, alpha: float = 0.05) -> tuple[float, float]:
    """Exact two-sided interval of a share, at confidence 1 - alpha."""
    low = float(beta.ppf(alpha / 2, count, total - count + 1)) if count > 0 else 0.0
    high = float(beta.ppf(1 - alpha / 2, count + 1, total - count)) if count < total else 1.0
    return low, high


def halves(shadows: int, images: int, generator: np.random.Generator) -> np.ndarray:
    """Which shadow learns which image, bool (S, N): every image is in exactly half of them.

    Raises:
        ValueError: the number of shadows is odd or less than 2.
    """
    if shadows < 2 or shadows % 2:
        raise ValueError(f"shadows: expected an even number from 2, got {shadows}")
    return generator.random((shadows, images)).argsort(axis=0) < shadows // 2


def calibrated(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """LiRA offline: how far the target is above models that never saw the image.

    For a target of another kind than the shadows it is difficulty calibration.

    Args:
        target: Confidences (N,) of the network under attack.
        shadows: Those of the shadow models, (S, N).
        inside: Which shadow learnt which image, (S, N).
    """
    mean, deviation = _fit(shadows, ~inside)
    return (target - mean) / deviation


def likelihood_ratio(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """LiRA online: log-likelihood ratio of "learnt" against "not learnt", (N,).

    Normal distributions with a mean per image and one variance over images, as the paper advises
    for few shadows. Arguments as for `calibrated`.
    """
    learnt, unknown = (norm(*_fit(shadows, which)) for which in (inside, ~inside))
    ratio: np.ndarray = learnt.logpdf(target) - unknown.logpdf(target)
    return ratio


def _fit(shadows: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean per image (N,) and one standard deviation over the chosen shadows."""
    count = which.sum(0)
    mean = (shadows * which).sum(0) / count
    squares = (np.square(shadows - mean) * which).sum()
    freedom = max(int((count - 1).sum()), 1)
    return mean, max(float(np.sqrt(squares / freedom)), 1e-6)


def _resampled(count: int, generator: np.random.Generator) -> np.ndarray:
    """Weights (resamples, count) of draws with replacement; rows sum to one."""
    return generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES) / count
