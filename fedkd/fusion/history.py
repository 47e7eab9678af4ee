"""Teachers lose weight for every round in which they were far from the others."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Self

import torch
from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.fusion.geometric_median import nearest_to_all
from fedkd.knowledge.payload import Ensemble


def distances(context: FitContext) -> Tensor:
    """How far each teacher is from the others, (M,): mean total variation to a robust centre.

    Weighted by the teacher's weight: where the rules before give it none it may be wrong.
    """
    far: Tensor | float = 0.0
    total: Tensor | float = 0.0
    for _, ensemble in context.batches():
        probabilities = torch.softmax(ensemble.logits.float(), dim=-1)
        centre = nearest_to_all(probabilities, ensemble.weights)
        gaps = (probabilities - centre).abs().sum(dim=-1) / 2
        far = far + (ensemble.weights * gaps).sum(dim=1)
        total = total + ensemble.weights.sum(dim=1)
    assert isinstance(far, Tensor)
    assert isinstance(total, Tensor)
    return far / total.clamp(min=1e-12)


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

    rate: Positive = 5.0
    total: dict[int, float] = field(default_factory=dict, init=False)
    trust: Tensor | None = field(default=None, init=False)

    def fit(self, context: FitContext) -> Self:
        """TeacherWeights after this round."""
        before: dict[int, float] = {}
        if context.state:
            clients = context.state["clients"].tolist()
            before = dict(zip(clients, context.state["distances"].tolist()))
        start = min(before.values(), default=0.0)
        who = [teacher.number for teacher in context.bank.teachers]
        total = torch.tensor([before.get(c, start) for c in who]) + distances(context).cpu()
        ready = copy(self)
        ready.total = {**before, **dict(zip(who, total.tolist()))}
        # Against the most trusted: only differences matter, and nothing underflows.
        ready.trust = torch.exp(-self.rate * (total - total.min()))
        return ready

    @property
    def state(self) -> dict[str, Tensor]:
        """Every client's sum of distances so far."""
        clients = sorted(self.total)
        return {
            "clients": torch.tensor(clients, dtype=torch.long),
            "distances": torch.tensor([self.total[c] for c in clients]),
        }

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by trust."""
        return ensemble.weighted(self.known(self.trust).to(ensemble.weights)[:, None])
