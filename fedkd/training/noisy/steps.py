"""One batch of each phase, measured: what the loop minimises, and nothing else.

A network is whatever maps normalised images to logits, and images are floats, so that the values
of the published code can be repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.functional.noisy_labels import (
    balance_penalty,
    confidence_penalty,
    forget_loss,
    guess_loss,
    guess_weight,
    guessed_labels,
    refined_labels,
    soft_cross_entropy,
)
from fedkd.training.loop import Measured
from fedkd.training.noisy.options import Mix

Forward = Callable[[Tensor], Tensor]
"""Normalised images (B, ...) -> logits (B, C)."""


@dataclass(frozen=True)
class Mixed:
    """How the images of a batch are mixed.

    Attributes:
        share: Of each image in its mixture, at least a half.
        order: With which other image each is mixed, (rows,).
    """

    share: float
    order: Tensor


@dataclass(frozen=True)
class Labelled:
    """Images whose label counts as clean.

    Attributes:
        views: Weak views, normalised, from which targets are made; they are learnt from too,
            unless there are others.
        labels: Given labels, (B,).
        clean: Chance that each is right, (B,).
        shown: Views that are learnt from, where they are not the weak ones.
    """

    views: Sequence[Tensor]
    labels: Tensor
    clean: Tensor
    shown: Sequence[Tensor] = ()


def warmup_step(logits: Tensor, labels: Tensor, *, penalty: bool = False) -> Measured:
    """Cross entropy on the given labels; `penalty` keeps predictions from becoming certain."""
    loss = functional.cross_entropy(logits, labels)
    if not penalty:
        return Measured(loss, len(labels))
    held = confidence_penalty(logits).mean()
    return Measured(loss + held, len(labels), {"cross entropy": loss, "penalty": held})


def reference_step(logits: Tensor, classes: Tensor, certainty: Tensor) -> Measured:
    """Cross entropy on reference labels, each as far as it is certain.

    Args:
        logits: Of strong views, (B, C).
        classes: Reference labels, (B,).
        certainty: Of each, from 0 to 1, (B,); the paper's is the largest cosine.
    """
    loss = (certainty * functional.cross_entropy(logits, classes, reduction="none")).mean()
    return Measured(loss, len(classes))


def forget_step(logits: Tensor, snapshot_logits: Tensor, *, temperature: float) -> Measured:
    """What moves a network away from its frozen copy on samples to forget."""
    loss = forget_loss(logits, snapshot_logits, temperature=temperature).mean()
    return Measured(loss, len(logits))


def mix_step(
    network: Forward,
    guess: Sequence[Forward],
    labelled: Labelled,
    unlabelled: Sequence[Tensor],
    mixed: Mixed,
    *,
    weight: float,
    sharpen: float = 0.5,
) -> Measured:
    """Soft targets for labelled and unlabelled images, mixed, and how well they are met.

    Args:
        network: What learns.
        guess: Who names the targets: first the network itself, then its partner. Only the first
            is asked about labelled images.
        labelled: Images whose label counts as clean.
        unlabelled: Weak views of other images, normalised; none: they are left out.
        mixed: Over the rows of all views, the labelled ones first.
        weight: Of the loss on unlabelled images.
        sharpen: Temperature of the targets.
    """
    with torch.no_grad():
        own = [guess[0](view) for view in labelled.views]
        refined = refined_labels(labelled.labels, labelled.clean, own, temperature=sharpen)
        shown = [*(labelled.shown or labelled.views), *unlabelled]
        targets = [refined] * (len(shown) - len(unlabelled))
        if unlabelled:
            guesses = [who(view) for who in guess for view in unlabelled]
            targets += [guessed_labels(guesses, temperature=sharpen)] * len(unlabelled)
        rows, wanted = torch.cat(list(shown)), torch.cat(targets)
        share, order = mixed.share, mixed.order
        rows = share * rows + (1 - share) * rows[order]
        wanted = share * wanted + (1 - share) * wanted[order]
    logits = network(rows)
    first = len(labelled.labels) * (len(shown) - len(unlabelled))
    parts = {
        "labelled": soft_cross_entropy(logits[:first], wanted[:first]).mean(),
        "balance": balance_penalty(logits),
    }
    loss = parts["labelled"] + parts["balance"]
    if unlabelled:
        parts["guessed"] = guess_loss(logits[first:], wanted[first:]).mean()
        loss = loss + weight * parts["guessed"]
    return Measured(loss, len(labelled.labels), parts)


def mix_weight(epoch: float, warmup: int, mix: Mix) -> float:
    """Weight of the unlabelled part at a moment of the training."""
    return guess_weight(epoch, warmup=warmup, maximum=mix.weight, ramp=mix.ramp)
