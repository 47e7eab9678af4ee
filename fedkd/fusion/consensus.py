"""Teachers that agree with the others no better than chance lose their weight."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Annotated, Self

import torch
from torch import Tensor

from fedkd.functional.options import Minority, Range
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.knowledge.payload import Ensemble

# A teacher whose probabilities vary less than this over the transfer set tells images not apart.
CONSTANT = 1e-6


def agreement(context: FitContext) -> Tensor:
    """Correlation of each two teachers' probabilities over the images that both may judge, (M, M).

    `sum_c cov(p_ic, p_jc)` over the square roots of the same with themselves; an image counts as
    much as the product of both teachers' weights. A teacher that answers every image alike
    correlates with nobody.
    """
    both: Tensor | float = 0.0
    sums: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    products: Tensor | float = 0.0
    for _, ensemble in context.batches():
        weights = ensemble.weights.double()
        probabilities = torch.softmax(ensemble.logits.double(), dim=-1)
        weighted = weights[:, :, None] * probabilities
        both = both + weights @ weights.T
        sums = sums + torch.einsum("ibc,jb->ijc", weighted, weights)
        squares = squares + (weighted * probabilities).sum(dim=-1) @ weights.T
        products = products + torch.einsum("ibc,jbc->ij", weighted, weighted)
    assert isinstance(both, Tensor)
    assert isinstance(sums, Tensor)
    both = both.clamp(min=1e-30)
    means = sums / both[:, :, None]
    covariances = products / both - (means * means.transpose(0, 1)).sum(dim=-1)
    variances = (squares / both - means.square().sum(dim=-1)).clamp(min=0)
    spread = (variances * variances.T).sqrt()
    return torch.where(spread > CONSTANT, covariances / spread, 0.0).float()


@FUSIONS.register("consensus")
class Consensus(Fusion):
    """Silences for the round whoever agrees with too few others.

    A teacher's standing is the agreement that it reaches with more than `share` of the others, too
    many to be its accomplices. Liars that answer every image alike, wrong labels or anything
    random agree with honest teachers no better than chance, however much they agree with each
    other; honest teachers that know different classes still agree where both are at home. Chained
    after `density_ratio`, two teachers are compared where both claim to know.

    It does not see those who lie about some images and help with the others, and takes a client of
    a single class for a liar.

    Args:
        share: Share of the teachers that may collude.
        least: Smallest standing that counts, as a part of the median teacher's.
    """

    share: Minority = 0.3
    least: Annotated[float, Range(lambda x: 0 < x < 1, "between 0 and 1")] = 0.25
    kept: Tensor | None = field(default=None, init=False)

    def fit(self, context: FitContext) -> Self:
        """Who counts: all, if nobody stands above chance."""
        ready = copy(self)
        count = len(context.bank.teachers)
        ready.kept = torch.ones(count)
        if count > 1:
            others = ~torch.eye(count, dtype=torch.bool)
            agreed = agreement(context).cpu()[others].view(count, count - 1)
            standing = agreed.quantile(1 - self.share, dim=1)
            middle = standing.quantile(0.5)
            if middle > 0:
                ready.kept = (standing >= self.least * middle).float()
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights of those who count."""
        return ensemble.weighted(self.known(self.kept).to(ensemble.weights)[:, None])
