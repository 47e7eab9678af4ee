"""Undoing memorised mistakes: which samples to forget, the loss to forget them by, clean labels.

The parts of ACD-U as functions; `fedkd.training.noisy` is the training that calls them.

References:
    ACD-U, https://arxiv.org/abs/2603.07166, on top of
    Li et al., "DivideMix: Learning with Noisy Labels as Semi-supervised Learning", ICLR 2020,
        https://arxiv.org/abs/2002.07394
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.precision import full


def forget_loss(
    student_logits: Tensor, snapshot_logits: Tensor, *, temperature: float = 0.05
) -> Tensor:
    """-T^2 * KL(snapshot || student) per sample, (B, C) x (B, C) -> (B,): minimise it to forget.

    It has no least value: a few steps of a small learning rate are meant, with dropout or batch
    norm in training mode, for a student that equals its snapshot has no gradient. The published
    `distill_kl_loss` is minus the mean of this, and its unlearning step minimises minus that.
    Half precision is computed in float32.

    Args:
        student_logits: Of the samples to forget.
        snapshot_logits: Of the student as it was before it began to forget; detached.
        temperature: Softness of both distributions.
    """
    student = full(student_logits) / temperature
    snapshot = snapshot_logits.detach().to(student.dtype) / temperature
    log_q = F.log_softmax(snapshot, dim=1)
    kl = (log_q.exp() * (log_q - F.log_softmax(student, dim=1))).sum(dim=1)
    return -(temperature**2) * kl


def rescaled(losses: Tensor) -> Tensor:
    """Losses from 0 (least) to 1 (largest), (..., N) -> (..., N); zeros if all are equal."""
    losses = full(losses)
    least = losses.amin(dim=-1, keepdim=True)
    width = losses.amax(dim=-1, keepdim=True) - least
    return (losses - least) / torch.where(width > 0, width, 1)


def select_for_unlearning(
    losses: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    *,
    period: int = 10,
    current: float | None = 0.05,
    drop: float | None = 0.20,
) -> Tensor:
    """Samples that are learnt very well or very fast and whose label is doubtful, (N,) of bool.

    Args:
        losses: Loss of each sample after each epoch so far, `rescaled`, (epochs, N).
        labels: Possibly wrong labels, (N,).
        reference: Labels from another source (the paper: CLIP without training), (N,); a sample
            on which both agree is kept. None doubts every label.
        period: Epochs over which the loss fell.
        current: Share of samples with the lowest loss now; None leaves out this reason.
        drop: Share of samples whose loss fell most; None leaves out this reason.

    Raises:
        ValueError: there are too few epochs.
    """
    if len(losses) <= period:
        raise ValueError(f"unlearning compares losses {period} epochs apart, got {len(losses)}")
    now = losses[-1]
    chosen = torch.zeros_like(now, dtype=torch.bool)
    if current is not None:
        chosen |= now < torch.quantile(now, current)
    if drop is not None:
        change = now - losses[-1 - period]
        chosen |= change < torch.quantile(change, drop)
    return chosen if reference is None else chosen & (labels != reference)


@dataclass(frozen=True)
class Mixture:
    """Two Gaussians over the losses of all samples, the lower one first.

    Attributes:
        clean: Chance that each sample is of the lower one, (N,).
        means: Of both.
        deviations: Likewise.
        shares: Likewise; they sum to one.
    """

    clean: Tensor
    means: tuple[float, float]
    deviations: tuple[float, float]
    shares: tuple[float, float]


def loss_mixture(
    losses: Tensor,
    *,
    average: int = 1,
    prior: float | None = None,
    iterations: int = 10,
    tolerance: float = 1e-2,
    regularisation: float = 5e-4,
) -> Mixture | None:
    """Two Gaussians over losses; None if all losses are equal.

    Args:
        losses: Loss of each sample after each epoch so far, `rescaled`, (epochs, N), or (N,).
        average: Epochs whose losses are averaged; 5 where 90 % of the labels are wrong.
        prior: Share of clean labels where it is known; None: the mixture's own.
        iterations: Steps of expectation and maximisation at most.
        tolerance: Gain in mean log-likelihood below which it ends.
        regularisation: Added to both variances.
    """
    losses = torch.atleast_2d(losses)[-average:].double().mean(dim=0)
    if losses.amax() == losses.amin():
        return None
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        2, max_iter=iterations, tol=tolerance, reg_covar=regularisation, random_state=0
    )
    column = losses.cpu().numpy()[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten steps need not converge, and were published
        mixture.fit(column)
    order = [int(row) for row in np.argsort(np.asarray(mixture.means_)[:, 0], kind="stable")]
    if prior is not None:
        mixture.weights_ = np.array([prior, 1 - prior])[np.argsort(order)]
    means, variances = np.asarray(mixture.means_), np.asarray(mixture.covariances_)
    weights, chances = np.asarray(mixture.weights_), mixture.predict_proba(column)
    first, second = order
    return Mixture(
        torch.from_numpy(chances[:, first]).to(losses),
        (float(means[first, 0]), float(means[second, 0])),
        (float(variances[first, 0, 0] ** 0.5), float(variances[second, 0, 0] ** 0.5)),
        (float(weights[first]), float(weights[second])),
    )


def clean_probability(
    losses: Tensor,
    *,
    average: int = 1,
    prior: float | None = None,
    iterations: int = 10,
    tolerance: float = 1e-2,
    regularisation: float = 5e-4,
) -> Tensor:
    """Chance that each label is clean: of the lower of two Gaussians over losses, -> (N,).

    Labels are called clean above 0.5, with many wrong ones above 0.6. If all losses are equal all
    labels are clean. Arguments as in `loss_mixture`.
    """
    found = loss_mixture(
        losses,
        average=average,
        prior=prior,
        iterations=iterations,
        tolerance=tolerance,
        regularisation=regularisation,
    )
    return torch.ones_like(torch.atleast_2d(losses)[-1].double()) if found is None else found.clean


def sharpened(probabilities: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Probabilities to the power 1 / temperature, normalised, (B, C) -> (B, C)."""
    return torch.softmax(probabilities.log() / temperature, dim=1)


def refined_labels(
    labels: Tensor, clean: Tensor, views: Sequence[Tensor], *, temperature: float = 0.5
) -> Tensor:
    """Labels as far as they are clean, else what the network says, sharpened -> (B, C), detached.

    Args:
        labels: Class indices, (B,).
        clean: `clean_probability` of each, (B,).
        views: Logits of the same images in several weak views, (B, C) each.
        temperature: Of the sharpening.
    """
    own = _mean_probabilities(views)
    given = F.one_hot(labels, own.shape[1]).to(own.dtype)
    clean = clean.to(own.dtype)[:, None]
    return sharpened(clean * given + (1 - clean) * own, temperature=temperature)


def guessed_labels(views: Sequence[Tensor], *, temperature: float = 0.5) -> Tensor:
    """What several networks predict for several views together, sharpened -> (B, C), detached.

    Args:
        views: Logits per network and view, (B, C) each.
        temperature: Of the sharpening.
    """
    return sharpened(_mean_probabilities(views), temperature=temperature)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with probabilities as targets, per sample, (B, C) x (B, C) -> (B,).

    The mean is DivideMix's loss on samples with a clean label.
    """
    return -(F.log_softmax(full(logits), dim=1) * targets).sum(dim=1)


def guess_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean square of the difference in probabilities, per sample, (B, C) x (B, C) -> (B,).

    The mean is DivideMix's loss on samples with a guessed label.
    """
    return (torch.softmax(full(logits), dim=1) - targets).square().mean(dim=1)


def guess_weight(
    epoch: float, *, warmup: int = 10, maximum: float = 25.0, ramp: float = 16.0
) -> float:
    """Weight of `guess_loss`: 0 until `warmup`, then rising over `ramp` epochs to `maximum`."""
    return maximum * min(max((epoch - warmup) / ramp, 0.0), 1.0)


def balance_penalty(logits: Tensor) -> Tensor:
    """KL(uniform || mean prediction of the batch), (B, C) -> scalar."""
    log_p = F.log_softmax(full(logits), dim=1)
    log_mean = log_p.logsumexp(dim=0) - math.log(len(log_p))
    return -log_mean.mean() - math.log(len(log_mean))


def confidence_penalty(logits: Tensor) -> Tensor:
    """Minus the entropy of each prediction, (B, C) -> (B,): for labels confused class by class."""
    log_p = F.log_softmax(full(logits), dim=1)
    return (log_p.exp() * log_p).sum(dim=1)


@torch.no_grad()
def _mean_probabilities(views: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.softmax(full(logits), dim=1) for logits in views]).mean(dim=0)
