"""Teachers count on an image by how well they agree with what all of them together make likely."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import field
from typing import Self

import torch
from torch import Tensor

from fedkd.functional.options import Count, Minority, NotNegative, Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.knowledge.payload import Ensemble

# Dependence is raised to this power, so that clients whose errors are somewhat alike, because their
# data are, keep their weights.
SHARPNESS = 3
# Smallest distance from the likeness that is taken for honest to a perfect one.
ROOM = 0.1


@FUSIONS.register("dawid_skene")
class DawidSkene(Fusion):
    """Learns which classes each teacher takes for which, and weighs its answers accordingly.

    Expectation-maximisation over the transfer set estimates a confusion matrix per teacher and a
    posterior of the class per image. A teacher's weight on an image is multiplied by
    `least` + the posterior of what it answers. One that calls some classes by a wrong name, and
    tells the truth about the others, is not followed where it does so, even if it has others on
    its side: their answers no longer tell which of the two classes it is.

    Answers are soft, and count by the weights of the rules before: chained after `density_ratio`,
    a teacher is judged where it claims to know. Confusions are estimated from all that a teacher
    answers, so whoever errs at random as often as honest teachers do is not seen in them.

    Teachers that err together count less. A lie needs several voices for the same wrong class on
    the same image, and honest teachers do not often err alike. Likeness is the cosine of two
    teachers' answers less the posterior by all others. Dependence is how far it is above what is
    usual, from 0 to 1: above the median pair, and above what either of the two shares with more
    teachers than could be its accomplices. A teacher's weight is divided by 1 + `dependence` x the
    sum over the others of the third power. With 1, a group that errs as one counts as one; more
    makes up for a posterior that has followed the group in part. Time grows with the square of
    the number of teachers.

    Args:
        evidence: What one teacher of average weight counts in the posterior, in answers; what is
            old (`federation.stale`) counts less.
        diagonal: Prior answers of each class, assumed right.
        off_diagonal: Prior answers for each other class.
        least: Weight that disagreement leaves.
        iterations: Of the estimation.
        dependence: How much teachers that err together are discounted; 0 takes all for
            independent.
        share: Share of the teachers that may collude.

    References:
        Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
            Algorithm", Applied Statistics 28(1), 1979, https://doi.org/10.2307/2346806 (with soft,
            weighted answers here)
        Dong, Berti-Equille and Srivastava, "Integrating Conflicting Data: The Role of Source
            Dependence", VLDB 2009, https://doi.org/10.14778/1687627.1687690 (shared errors tell
            sources that depend on each other; the measure is ours)
    """

    evidence: Positive = 3.0
    diagonal: Positive = 4.0
    off_diagonal: Positive = 0.2
    least: Positive = 0.3
    iterations: Count = 10
    dependence: NotNegative = 5.0
    share: Minority = 0.3
    # log p(answer | class, teacher), (M, C, C), and log p(class), (C,)
    confusion: Tensor | None = field(default=None, init=False)
    classes: Tensor | None = field(default=None, init=False)
    # What is left of each teacher's weight, (M,)
    independence: Tensor | None = field(default=None, init=False)

    def fit(self, context: FitContext) -> Self:
        """Confusion matrices and dependence of this round."""
        ready = copy(self)
        ready.confusion = ready.classes = ready.independence = None
        if self.dependence:  # before a posterior follows anybody
            ready._estimate(context, confusions=False)
        for _ in range(self.iterations):
            ready._estimate(context, confusions=True)
        return ready

    def _estimate(self, context: FitContext, *, confusions: bool) -> None:
        """One pass over the images: the posterior so far, and what follows from it."""
        counts: Tensor | float = 0.0
        mass: Tensor | float = 0.0
        errors = _Errors()
        for _, given in context.batches():
            ensemble = self._discounted(given)
            answers = torch.softmax(ensemble.logits.float(), dim=-1)
            posterior = self._posterior(ensemble, answers)
            votes = self._votes(ensemble)
            counts = counts + torch.einsum("mb,bc,mbk->mck", votes, posterior, answers)
            mass = mass + posterior.sum(dim=0)
            if self.dependence:
                errors.add(given.weights, answers, self._support(ensemble, answers), self.classes)
        assert isinstance(counts, Tensor)
        assert isinstance(mass, Tensor)
        if confusions:
            right = self.diagonal * torch.eye(counts.shape[-1], device=counts.device)
            counts = counts + right + self.off_diagonal
            self.confusion = (counts / counts.sum(dim=-1, keepdim=True)).log()
            self.classes = ((mass + 1e-3 * mass.sum()) / mass.sum()).log()
        if self.dependence:
            shared = errors.dependence(self.share).pow(SHARPNESS).sum(dim=1)
            self.independence = 1 / (1 + self.dependence * shared)

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by agreement with the posterior, less for those who err together."""
        self.known(self.confusion)
        ensemble = self._discounted(ensemble)
        answers = torch.softmax(ensemble.logits.float(), dim=-1)
        agreed = torch.einsum("bc,mbc->mb", self._posterior(ensemble, answers), answers)
        return ensemble.weighted((self.least + agreed).to(ensemble.weights))

    def _discounted(self, ensemble: Ensemble) -> Ensemble:
        if self.independence is None:
            return ensemble
        return ensemble.weighted(self.independence.to(ensemble.weights)[:, None])

    def _votes(self, ensemble: Ensemble) -> Tensor:
        voices = len(ensemble.teachers) if ensemble.voices is None else ensemble.voices
        return self.evidence * voices * ensemble.weights.float()

    def _support(self, ensemble: Ensemble, answers: Tensor) -> Tensor:
        """What each teacher adds to the posterior, (M, B, C): log likelihoods; before anything is
        estimated, its part of the weighted mean answer."""
        if self.confusion is None:
            return ensemble.weights.float()[:, :, None] * answers
        known = self.confusion.to(answers)
        return torch.einsum("mb,mbk,mck->mbc", self._votes(ensemble), answers, known)

    def _posterior(self, ensemble: Ensemble, answers: Tensor) -> Tensor:
        """Class probabilities (B, C)."""
        if self.confusion is None or self.classes is None:
            return torch.einsum("mb,mbc->bc", ensemble.weights.float(), answers)
        known = self.confusion.to(answers)
        votes = self._votes(ensemble)
        likely = torch.einsum("mb,mbk,mck->bc", votes, answers, known)
        return torch.softmax(likely + self.classes.to(answers), dim=-1)


class _Errors:
    """How alike each two teachers' errors are, image by image where both have weight."""

    def __init__(self) -> None:
        self.products: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0

    def add(
        self, weights: Tensor, answers: Tensor, support: Tensor, classes: Tensor | None
    ) -> None:
        """Some images.

        Args:
            weights: (M, B).
            answers: (M, B, C).
            support: Of each class by each teacher, (M, B, C): logarithms if there are `classes`.
            classes: Log probabilities of the classes, (C,).
        """
        count = len(weights)
        products = torch.zeros(count, count, dtype=torch.float64, device=answers.device)
        squares = torch.zeros_like(products)
        total = support.sum(dim=0)
        for i in range(count - 1):
            rest = total - support[i] - support[i + 1 :]  # by all but i and each j after it
            if classes is None:
                rest = rest.clamp(min=1e-9)
                posterior = rest / rest.sum(dim=-1, keepdim=True)
            else:
                posterior = torch.softmax(rest + classes.to(rest), dim=-1)
            own, other = answers[i] - posterior, answers[i + 1 :] - posterior
            both = weights[i] * weights[i + 1 :]
            products[i, i + 1 :] = (both * (own * other).sum(dim=-1)).sum(dim=-1)
            squares[i, i + 1 :] = (both * own.square().sum(dim=-1)).sum(dim=-1)
            squares[i + 1 :, i] = (both * other.square().sum(dim=-1)).sum(dim=-1)
        self.products = self.products + products + products.T
        self.squares = self.squares + squares
        self.weight = self.weight + weights.sum(dim=1)

    def dependence(self, share: float) -> Tensor:
        """How far two teachers' errors are more alike than usual, in [0, 1], (M, M).

        Args:
            share: Of the teachers that may collude. Beside them, one that they copy is as like them
                as they are; and never can most of the teachers be too much alike.
        """
        assert isinstance(self.products, Tensor)
        assert isinstance(self.squares, Tensor)
        assert isinstance(self.weight, Tensor)
        likeness = self.products / (self.squares * self.squares.T).sqrt().clamp(min=1e-30)
        active = self.weight > 0
        pairs = (active[:, None] & active).triu(diagonal=1)
        if not pairs.any():
            return torch.zeros_like(likeness)
        pairs = pairs | pairs.T
        count = int(active.sum())
        rank = max(min(math.floor(share * (count - 1)) + 1, count // 2 - 1), 0)
        own = likeness.masked_fill(~pairs, -1).sort(dim=1, descending=True).values[:, rank]
        usual = torch.maximum(own[:, None], own).clamp(min=float(likeness[pairs].quantile(0.5)))
        above = ((likeness - usual) / (1 - usual).clamp(min=ROOM)).clamp(0, 1)
        return torch.where(pairs, above, 0.0)
