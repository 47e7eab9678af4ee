"""Teachers count where they support the class that most sure teachers support."""

from __future__ import annotations

from typing import Annotated

import torch
from torch.nn.functional import one_hot

from fedkd.functional.options import Range
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("knowledge_vote")
class KnowledgeVote(Fusion):
    """KD3A's knowledge vote: only teachers who are sure vote, and only the winners' voters count.

    Where nobody is sure, all vote.

    Args:
        confidence: Least probability of a teacher's first class.

    References:
        Feng et al., "KD3A: Unsupervised Multi-Source Decentralized Domain Adaptation via
            Knowledge Distillation", ICML 2021, https://arxiv.org/abs/2011.09757, Eq. 4
    """

    confidence: Annotated[float, Range(lambda x: 0 <= x <= 1, "between 0 and 1")] = 0.9

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights of the supporters of the winning class."""
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        surest, named = probabilities.max(dim=-1)  # (M, B)
        votes = (surest >= self.confidence) & (ensemble.weights > 0)
        votes = torch.where(votes.any(dim=0), votes, ensemble.weights > 0)
        weighted = (ensemble.weights * votes)[..., None]
        support = (weighted * one_hot(named, probabilities.shape[-1])).sum(dim=0)
        # The mass behind a class decides a draw.
        support = support + 1e-6 * (weighted * probabilities).sum(dim=0)
        winner = support.argmax(dim=-1)
        return ensemble.weighted((votes & (named == winner)).to(ensemble.weights))
