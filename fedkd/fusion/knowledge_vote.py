"""Teachers count where they support the class that most sure teachers support."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Annotated, Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.functional.options import Range
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.fusion.sample_count import believed_sizes
from fedkd.knowledge.payload import Ensemble

# Claims of more images than so many times the median's are not believed.
CAP = 10.0


@FUSIONS.register("knowledge_vote")
class KnowledgeVote(Fusion):
    """KD3A's knowledge vote: only teachers who are sure vote, and only the winners' voters count.

    Where nobody is sure, all vote. With `focus` a teacher k also counts by its consensus focus,
    n_k exp(Q(all) - Q(without k)): Q is how many support the winner and how surely, the sum of
    their first probabilities, over the mean image; without a sure teacher an image adds nothing.
    The paper takes a sum over the images instead of the mean, which leaves one teacher.

    Args:
        confidence: Least probability of a teacher's first class.
        focus: Whether teachers count by their numbers of images, and by what they add to the
            consensus.

    References:
        Feng et al., "KD3A: Unsupervised Multi-Source Decentralized Domain Adaptation via
            Knowledge Distillation", ICML 2021, https://arxiv.org/abs/2011.09757, Section 3
    """

    confidence: Annotated[float, Range(lambda x: 0 <= x <= 1, "between 0 and 1")] = 0.9
    focus: bool = False
    weights: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.discloses = ("num_examples",) if self.focus else ()

    def fit(self, context: FitContext) -> Self:
        """With `focus`: what each teacher adds to the others' consensus."""
        if not self.focus:
            return self
        ready, count = copy(self), len(context.bank.teachers)
        qualities = torch.zeros(count + 1, dtype=torch.float64)
        # The last row leaves out nobody.
        kept = 1 - torch.eye(count + 1, count)
        for _, ensemble in context.batches():
            for number, mask in enumerate(kept.to(ensemble.weights)):
                some = ensemble.weights * mask[:, None]
                supporters, surest, sure = self._vote(ensemble.logits, some)
                qualities[number] += (supporters * sure * surest).sum().cpu()
        added = (qualities[-1] - qualities[:-1]) / context.bank.num_samples
        ready.weights = (believed_sizes(context.bank.teachers, CAP) * added.exp()).float()
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights of the supporters of the winning class."""
        if self.focus:
            ensemble = ensemble.weighted(self.known(self.weights).to(ensemble.weights)[:, None])
        supporters, _, _ = self._vote(ensemble.logits, ensemble.weights)
        return ensemble.weighted(supporters.to(ensemble.weights))

    def _vote(self, logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Supporters of the winner (M, B), first probabilities (M, B), whether any is sure (B,)."""
        probabilities = torch.softmax(logits.float(), dim=-1)
        surest, named = probabilities.max(dim=-1)  # (M, B)
        votes = (surest >= self.confidence) & (weights > 0)
        sure = votes.any(dim=0)
        votes = torch.where(sure, votes, weights > 0)
        weighted = (weights * votes)[..., None]
        support = (weighted * one_hot(named, probabilities.shape[-1])).sum(dim=0)
        # The mass behind a class decides a draw.
        support = support + 1e-6 * (weighted * probabilities).sum(dim=0)
        return votes & (named == support.argmax(dim=-1)), surest, sure
