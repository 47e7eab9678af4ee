"""The baseline for teachers of different classes: zeros for what they do not know."""

from __future__ import annotations

import torch

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import AGGREGATE, Ensemble


@FUSIONS.register("padded")
class Padded(Fusion):
    """The mean of logits in which an unknown class stands as 0: what `specialists` is held against.

    A specialist's logits lie around 0 whatever the image is, so nobody is asked whose it is.
    """

    partial = True
    completes = True

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher with the mean logits, in every view."""
        tensors: dict[Kind, torch.Tensor] = {}
        for kind, logits in ensemble.tensors.items():
            if kind.logits and isinstance(logits, torch.Tensor):
                full = torch.where(logits.isneginf(), 0.0, logits.float())
                tensors[kind] = torch.einsum("mb,mbc->bc", ensemble.weights, full)[None]
        return Ensemble((AGGREGATE,), tensors, torch.ones_like(ensemble.weights[:1]))
