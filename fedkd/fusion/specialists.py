"""Teachers that know different classes become one that knows them all."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Literal, Self

import torch

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.fusion.density_ratio import DensityRatio
from fedkd.fusion.entropy import relative_entropy
from fedkd.fusion.sample_count import believed_sizes
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import AGGREGATE, Ensemble, union


@FUSIONS.register("specialists")
class Specialists(Fusion):
    """Each class is voted on by the teachers that know it, in so far as the image is theirs.

    `p[c] ~ sum r_k n_k q_k[c] / sum n_k`, both over the teachers k that know class c: q_k are the
    probabilities of teacher k among its own classes, n_k the examples it learnt from, and r_k is
    the weight that earlier rules gave it on the image times what `mine` says. A class that a
    teacher does not know is unknown to it, not unlikely. What is left is one teacher of all
    classes, so every rule and loss over logits may follow; what is not logits is dropped.

    Discloses one number per transfer image about the client's own images where `mine` is
    `density_ratio` and, with `by_size`, how many they are.

    Args:
        mine: Whether an image is a teacher's own: `density_ratio` by likeness to its images,
            `entropy` by how sure it is (1 - H / log C_k: specialists are often sure of strange
            images too), `earlier` by nothing but the rules before this one.
        by_size: Count teachers by their number of examples.
        cap: Largest believed number of examples, in multiples of the median.
    """

    partial = True
    completes = True

    mine: Literal["density_ratio", "entropy", "earlier"] = "density_ratio"
    by_size: bool = True
    cap: Positive = 3.0
    ratio: DensityRatio | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.discloses = ("num_examples",) if self.by_size else ()
        if self.mine == "density_ratio":
            self.ratio = DensityRatio(by_size=False)
            self.needs = self.ratio.needs

    def fit(self, context: FitContext) -> Self:
        """The density ratios scaled, as `density_ratio` scales them."""
        ready = copy(self)
        ready.ratio = None if self.ratio is None else self.ratio.fit(context)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """One teacher with log-probabilities over all classes, in every view."""
        sizes = torch.ones_like(ensemble.weights[:, 0])
        if self.by_size:
            sizes = believed_sizes(ensemble.teachers, self.cap).to(sizes)
        if self.ratio is not None:
            ensemble = self.ratio(ensemble)
        elif self.mine == "entropy":
            ensemble = ensemble.weighted(1 - relative_entropy(ensemble))
        known = ensemble.known
        if known is None:
            known = torch.ones_like(ensemble.logits[:, 0], dtype=torch.bool)
        tensors: dict[Kind, torch.Tensor] = {}
        for kind, logits in ensemble.tensors.items():
            if kind.logits and isinstance(logits, torch.Tensor):
                own = torch.softmax(logits.float(), dim=-1)
                together = union(own, ensemble.weights, known, sizes)
                tensors[kind] = together.clamp(min=1e-12).log()[None]
        return Ensemble((AGGREGATE,), tensors, torch.ones_like(ensemble.weights[:1]))
