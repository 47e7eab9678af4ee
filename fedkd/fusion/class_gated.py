"""Teachers count by the classes they have seen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("class_gated")
class ClassGated(Fusion):
    """A teacher counts for a class in so far as it has seen the class.

    Two steps, both per sample. First the teachers vote on what the sample is: each teacher's
    probabilities are divided by its own class frequencies (a teacher that saw little but one
    class calls everything that class, and the division takes this bias out), and each class is
    averaged over the teachers by their share of that class's examples. Then a teacher's weight
    is its share of the classes the vote believes in.

    Discloses each client's class counts to the server.

    Args:
        smoothing: Examples added to every count, so that a class seen once is not fully trusted.
        sharpness: Exponent of the vote; large values trust its winner only.
    """

    discloses = ("class_counts",)
    partial = True

    smoothing: Positive = 1.0
    sharpness: Positive = 1.0

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by share of the classes voted for; `class_weights` by coverage."""
        return gate(ensemble, self._counts(ensemble), self.smoothing, self.sharpness)

    @staticmethod
    def _counts(ensemble: Ensemble) -> Tensor:
        missing = [t.number for t in ensemble.teachers if t.class_counts is None]
        if missing:
            raise ValueError(f"fusion 'class_gated' needs the class counts of client {missing[0]}")
        counts = torch.tensor([t.class_counts for t in ensemble.teachers], dtype=torch.float32)
        return counts.to(ensemble.weights.device)


def gate(ensemble: Ensemble, counts: Tensor, smoothing: float, sharpness: float) -> Ensemble:
    """See `ClassGated`; `counts` (M, C) are examples of each class that each teacher has seen."""
    share = counts / counts.sum(dim=0).clamp(min=1)  # (M, C): who holds class c
    held: Tensor | float = 1.0  # (B, C): by teachers that count, where they count less by age
    if ensemble.voices is not None:
        held = torch.einsum("mb,mc->bc", ensemble.weights, share).clamp(min=1e-30)
    frequency = counts + smoothing
    frequency = frequency / frequency.sum(dim=1, keepdim=True)  # (M, C): teacher's prior
    log_p = torch.log_softmax(ensemble.logits, dim=-1)
    unbiased = torch.softmax(log_p - frequency.log()[:, None, :], dim=-1)  # (M, B, C)
    vote = torch.einsum("mb,mc,mbc->bc", ensemble.weights, share, unbiased)
    belief = (vote / held).pow(sharpness)
    belief = belief / belief.sum(dim=1, keepdim=True).clamp(min=1e-30)
    gated = ensemble.weighted(torch.einsum("bc,mc->mb", belief / held, share))
    return replace(gated, class_weights=counts / (counts + smoothing))
