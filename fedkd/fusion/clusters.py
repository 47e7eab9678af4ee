"""Teachers that agree become one."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Self

import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import AGGREGATE, FitContext, Fusion
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("clusters")
class Clusters(Fusion):
    """Groups of teachers by agreement; each group is one teacher that says its weighted mean.

    Between one fused relation graph (`merge`) and a graph for each teacher (the sum): the losses
    that compare relations pay for `count` graphs.

    Args:
        count: Groups; no more than there are teachers.

    References:
        Average linkage of the mean total variation between teachers' predictions (scikit-learn).
    """

    def __init__(self, *, count: int = 3) -> None:
        if count < 1:
            raise ValueError(f"fusion 'clusters': count must be at least 1, got {count}")
        self.count = count
        self.groups: Tensor | None = None  # (M,)

    def fitted(self, evidence: FitContext) -> Self:
        """Who belongs together."""
        total = 0.0 * torch.zeros(0)
        for _, ensemble in evidence.batches():
            said = torch.softmax(ensemble.logits.float(), dim=-1).flatten(1)
            gaps = torch.cdist(said, said, p=1)
            total = gaps if total.numel() == 0 else total + gaps
        count = min(self.count, len(total))
        ready = copy(self)
        if count == len(total):
            ready.groups = torch.arange(count)
            return ready
        model = AgglomerativeClustering(count, metric="precomputed", linkage="average")
        ready.groups = torch.from_numpy(model.fit_predict(total.numpy()))
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher per group, with the say of all its members."""
        if self.groups is None:
            raise RuntimeError("fusion 'clusters' has to see the whole transfer set: use fit_rules")
        groups = self.groups.to(ensemble.weights.device)
        count = int(groups.max()) + 1
        members = torch.nn.functional.one_hot(groups, count).T.to(ensemble.weights)  # (G, M)
        say = members @ ensemble.weights
        inside = members[:, :, None] * ensemble.weights
        size = members.sum(dim=1)[:, None, None]
        # A group without any say on a sample still has an opinion: its plain mean.
        inside = torch.where(
            say[:, None] > 0, inside / say[:, None].clamp(min=1e-30), members[:, :, None] / size
        )
        tensors: dict[Kind, Tensor | Sequence[Tensor]] = {}
        for kind, logits in ensemble.tensors.items():
            if kind.logits and isinstance(logits, Tensor):
                said = torch.softmax(logits.float(), dim=-1)
                tensors[kind] = torch.einsum("gmb,mbc->gbc", inside, said).clamp(min=1e-12).log()
        teachers = tuple(replace(AGGREGATE, client=-1 - group) for group in range(count))
        return Ensemble(teachers, tensors, say)
