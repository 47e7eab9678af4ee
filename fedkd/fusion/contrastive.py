"""Teachers count where their answer is found among all others."""

from __future__ import annotations

from copy import copy
from dataclasses import field
from typing import Self

import torch
from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion
from fedkd.knowledge.payload import Ensemble

# Numbers held at once: rows of the similarities of samples, never all of them.
_BLOCK = 2**22


@FUSIONS.register("contrastive")
class Contrastive(Fusion):
    """A teacher counts on a sample in so far as its answer points to that sample and no other.

    CreamFL's weight: of teacher k on sample n, `softmax over k of log softmax over m of
    <v_kn, g_m>, at m = n`. It compares embeddings with those of a common model; here v are centred
    logits made unit vectors, which networks of any width and modality share, and g the teachers'
    mean of them, which a test image has as well. What a teacher confuses with samples of another
    kind, it has no say in.

    Args:
        temperature: What cosines are divided by; large values leave all teachers alike.

    References:
        Yu et al., "Multimodal Federated Learning via Contrastive Representation Ensemble"
            (CreamFL), ICLR 2023, https://arxiv.org/abs/2302.08888
    """

    temperature: Positive = 0.1
    common: Tensor | None = field(default=None, init=False)

    def fit(self, context: FitContext) -> Self:
        """The common vectors of the whole transfer set, (N, C)."""
        ready = copy(self)
        found = [_common(ensemble, _vectors(ensemble)) for _, ensemble in context.batches()]
        ready.common = torch.cat(found)
        return ready

    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Weights by how clearly each teacher's answer belongs to its sample."""
        vectors = _vectors(ensemble)
        own, common = _common(ensemble, vectors), self.known(self.common).to(vectors)
        scores = contrast(vectors, own, common, self.temperature)
        # Relative to the best teacher with weight: all may be far from what is common.
        heard = torch.where(ensemble.weights > 0, scores, -torch.inf)
        return ensemble.weighted((scores - heard.amax(dim=0)).clamp(max=0).exp())


def contrast(vectors: Tensor, own: Tensor, common: Tensor, temperature: float) -> Tensor:
    """`<v_kb, g_b> / T - logsumexp over m of <v_kb, g_m> / T`, (M, B).

    Args:
        vectors: The teachers', (M, B, C).
        own: What is common about these samples, (B, C).
        common: About all samples, (N, C).
        temperature: T.
    """
    alone = torch.einsum("kbc,bc->kb", vectors, own) / temperature
    flat = vectors.flatten(0, 1)
    step = max(1, _BLOCK // len(common))
    others = [torch.logsumexp(rows @ common.T / temperature, dim=1) for rows in flat.split(step)]
    return alone - torch.cat(others).view_as(alone)


def _vectors(ensemble: Ensemble) -> Tensor:
    """Centred logits as unit vectors, (M, B, C); a teacher that prefers nothing has zeros."""
    logits = torch.log_softmax(ensemble.logits.float(), dim=-1).clamp(min=-1e4)
    logits = logits - logits.mean(dim=-1, keepdim=True)
    return logits / logits.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _common(ensemble: Ensemble, vectors: Tensor) -> Tensor:
    return torch.einsum("kb,kbc->bc", ensemble.weights, vectors)
