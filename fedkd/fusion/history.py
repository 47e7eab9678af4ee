"""Teachers lose say for every round in which they were far from the others."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.fusion.geometric_median import nearest_to_all
from fedkd.knowledge.payload import Ensemble


def distances(evidence: FitContext) -> Tensor:
    """How far each teacher is from the others, (M,): mean total variation to a robust centre.

    Weighted by the teacher's say: where the rules before give it none it may be wrong.
    """
    far: Tensor | float = 0.0
    say: Tensor | float = 0.0
    for _, ensemble in evidence.batches():
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        centre = nearest_to_all(probabilities, ensemble.weights)
        gaps = (probabilities - centre).abs().sum(dim=-1) / 2
        far = far + (ensemble.weights * gaps).sum(dim=1)
        say = say + ensemble.weights.sum(dim=1)
    assert isinstance(far, Tensor)
    assert isinstance(say, Tensor)
    return far / say.clamp(min=1e-12)


@FUSIONS.register("history")
class History(Fusion):
    """Exponential weights over rounds: `w_m = exp(-rate * sum of distances so far)`.

    What a teacher did in earlier rounds counts as much as what it does now, so one who attacks now
    and then is not forgiven at once. A client that comes late starts where the best one stands.

    Args:
        rate: How fast trust falls with the distance to the robust centre.

    References:
        Roux et al., "On the Byzantine-Resilience of Distillation-Based Federated Learning"
            (ExpGuard), ICLR 2025, https://arxiv.org/abs/2402.12265
    """

    def __init__(self, *, rate: float = 5.0) -> None:
        if rate <= 0:
            raise ValueError(f"fusion 'history': rate must be positive, got {rate}")
        self.rate = rate
        self.known: dict[int, float] = {}
        self.trust: Tensor | None = None

    def fitted(self, evidence: FitContext) -> Self:
        """TeacherWeights after this round."""
        before: dict[int, float] = {}
        if evidence.memory:
            clients = evidence.memory["clients"].tolist()
            before = dict(zip(clients, evidence.memory["distances"].tolist()))
        start = min(before.values(), default=0.0)
        who = [teacher.client for teacher in evidence.bank.teachers]
        total = torch.tensor([before.get(c, start) for c in who]) + distances(evidence)
        ready = copy(self)
        ready.known = {**before, **dict(zip(who, total.tolist()))}
        # Against the most trusted: only differences matter, and nothing underflows.
        ready.trust = torch.exp(-self.rate * (total - total.min()))
        return ready

    @property
    def memory(self) -> dict[str, Tensor]:
        """Every client's sum of distances so far."""
        clients = sorted(self.known)
        return {
            "clients": torch.tensor(clients, dtype=torch.long),
            "distances": torch.tensor([self.known[c] for c in clients]),
        }

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by trust."""
        if self.trust is None:
            raise RuntimeError("fusion 'history' has to see the whole transfer set: use fit_rules")
        return ensemble.weighted(self.trust.to(ensemble.weights)[:, None])
