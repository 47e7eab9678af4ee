"""Teachers count on an image by how well they agree with what all of them together make likely."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Self

import torch
from torch import Tensor

from fedkd.functional.options import Count, Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.knowledge.payload import Ensemble


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
    answers, so whoever errs at random as often as honest teachers do is not seen.

    Args:
        evidence: What one teacher of average weight counts in the posterior, in answers.
        diagonal: Prior answers of each class, assumed right.
        off_diagonal: Prior answers for each other class.
        least: Weight that disagreement leaves.
        iterations: Of the estimation.

    References:
        Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
            Algorithm", Applied Statistics 28(1), 1979, https://doi.org/10.2307/2346806 (with soft,
            weighted answers here)
    """

    evidence: Positive = 3.0
    diagonal: Positive = 4.0
    off_diagonal: Positive = 0.2
    least: Positive = 0.3
    iterations: Count = 10
    # log p(answer | class, teacher), (M, C, C), and log p(class), (C,)
    confusion: Tensor | None = field(default=None, init=False)
    classes: Tensor | None = field(default=None, init=False)

    def fit(self, context: FitContext) -> Self:
        """Confusion matrices of this round."""
        ready = copy(self)
        ready.confusion = ready.classes = None
        for _ in range(self.iterations):
            counts: Tensor | float = 0.0
            mass: Tensor | float = 0.0
            for _, ensemble in context.batches():
                answers = torch.softmax(ensemble.logits.float(), dim=-1)
                posterior = ready._posterior(ensemble, answers)
                votes = ready._votes(ensemble)
                counts = counts + torch.einsum("mb,bc,mbk->mck", votes, posterior, answers)
                mass = mass + posterior.sum(dim=0)
            assert isinstance(counts, Tensor)
            assert isinstance(mass, Tensor)
            right = self.diagonal * torch.eye(counts.shape[-1], device=counts.device)
            counts = counts + right + self.off_diagonal
            ready.confusion = (counts / counts.sum(dim=-1, keepdim=True)).log()
            ready.classes = ((mass + 1e-3 * mass.sum()) / mass.sum()).log()
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by agreement with the posterior."""
        self.known(self.confusion)
        answers = torch.softmax(ensemble.logits.float(), dim=-1)
        agreed = torch.einsum("bc,mbc->mb", self._posterior(ensemble, answers), answers)
        return ensemble.weighted((self.least + agreed).to(ensemble.weights))

    def _votes(self, ensemble: Ensemble) -> Tensor:
        return self.evidence * len(ensemble.teachers) * ensemble.weights.float()

    def _posterior(self, ensemble: Ensemble, answers: Tensor) -> Tensor:
        """Class probabilities (B, C); before anything is estimated, the weighted mean answer."""
        if self.confusion is None or self.classes is None:
            return torch.einsum("mb,mbc->bc", ensemble.weights.float(), answers)
        known = self.confusion.to(answers)
        votes = self._votes(ensemble)
        likely = torch.einsum("mb,mbk,mck->bc", votes, answers, known)
        return torch.softmax(likely + self.classes.to(answers), dim=-1)
