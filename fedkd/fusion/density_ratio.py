"""Teachers count where the transfer images are like their own."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Self, cast

import torch
from torch import Tensor

from fedkd.functional.density_ratio import Features
from fedkd.functional.options import Count, Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.fusion.sample_count import believed_sizes
from fedkd.knowledge import kinds
from fedkd.knowledge.payload import Ensemble


@FUSIONS.register("density_ratio")
class DensityRatio(Fusion):
    """A teacher counts on an image in so far as the image could be one of its own.

    The teachers as a mixture of experts: `p(y|x) = sum_m p(m|x) p_m(y|x)` is exact when each
    teacher knows its own distribution, and by Bayes `p(m|x)` is the client's share of all images
    times the density ratio of its images to the transfer set at x. The ratio is estimated on the
    client (KuLSIF, as in Selective-FD: Shao, Wu, Zhang, "Selective knowledge sharing for
    privacy-preserving federated distillation without a good teacher", Nature Communications
    2024), which selects samples with it; here it weighs the teachers.

    Discloses one number per transfer image about the client's own images (the kind
    `DensityRatio`) and, with `by_size`, how many they are.

    Args:
        by_size: Weigh by the number of examples too, as Bayes' rule asks.
        cap: Largest believed number of examples, in multiples of the median.
        limit: Largest believed sum of share x ratio over the teachers at an image; what is above is
            taken from the highest claims. Private and transfer images of one distribution make that
            sum 1 everywhere, so with 1.0 nobody drowns the others out by claiming to know some
            images best. None believes all claims.
        components: Principal components of the images in which likeness is measured.
        bandwidth: Of the kernel, in medians of the transfer images' distances. Smaller ones send
            each image to fewer teachers: better, unless teachers are few or much alike.
        features: `pixels` compares images as they are, `gradients` by the directions of their
            edges, cell by cell.
        root: Root of the ratio that clients send. 2 keeps small ratios apart in the 8 bits that
            `int`, `topk` and `vote` give them.
    """

    partial = True

    by_size: bool = True
    cap: Positive = 3.0
    limit: Positive | None = None
    components: Count = 50
    bandwidth: Positive = 0.35
    features: Features = "pixels"
    root: Count = 1
    scale: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.discloses = ("num_examples",) if self.by_size else ()
        self.kind = kinds.DensityRatio(self.components, self.bandwidth, self.features, self.root)
        self.needs = (self.kind,)

    def fit(self, context: FitContext) -> Self:
        """Ratios scaled to a mean of one over the transfer set, and sizes believed up to `cap`.

        A ratio of densities has mean one; so nobody gains by claiming to know everything.
        """
        total = sum(
            self.kind.ratios(cast(Tensor, rows.tensors[self.kind])).sum(dim=1)
            for _, rows in context.batches()
        )
        assert isinstance(total, Tensor)
        scale = context.bank.num_samples / total.clamp(min=1e-30)
        ready = copy(self)
        ready.scale = torch.where(total > 0, scale, 0.0)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by density ratio; a sample that is likely for nobody keeps the weights it had."""
        scores = ensemble.tensors[self.kind]
        assert isinstance(scores, Tensor)
        scores = self.kind.ratios(scores)
        if self.scale is not None:
            scores = scores * self.scale[:, None].to(scores)
        shares = torch.ones(len(scores)).to(scores)
        if self.by_size:
            for teacher in ensemble.teachers:
                if teacher.num_examples is None:
                    raise ValueError(
                        f"fusion 'density_ratio' needs the number of examples of client "
                        f"{teacher.number}; with by_size: false it does without"
                    )
            shares = believed_sizes(ensemble.teachers, self.cap).to(scores)
        if self.limit is not None:
            claims = shares if ensemble.voices is None else shares[:, None] * ensemble.weights
            scores = limited(scores, claims / claims.sum(dim=0).clamp(min=1e-30), self.limit)
        return ensemble.weighted(shares[:, None] * scores)


def limited(ratios: Tensor, shares: Tensor, limit: float) -> Tensor:
    """Each image's largest ratios lowered to one level, the sum of `shares * ratios` to `limit`.

    Args:
        ratios: (M, B), not negative.
        shares: (M,), or (M, B) where they differ by image; sum 1.
        limit: Positive.

    Returns:
        (M, B): the smaller of the ratio and the image's level.
    """
    rising, order = ratios.sort(dim=0)
    sizes = shares[order] if shares.ndim == 1 else shares.gather(0, order)
    below = (sizes * rising).cumsum(dim=0) - sizes * rising  # what those with less claim
    above = sizes.flip(0).cumsum(dim=0).flip(0)  # the shares of the others
    # The first whose own ratio would be too high a level for itself and all above it is lowered,
    # and they with it; candidates from later ones are lower.
    level = torch.where(below + above * rising > limit, (limit - below) / above, -torch.inf)
    level = level.amax(dim=0)
    return torch.where(level.isfinite(), torch.minimum(ratios, level), ratios)
