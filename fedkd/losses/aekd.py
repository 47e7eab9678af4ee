"""Several teachers, weighed so that their gradients do not pull against each other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.options import Part, Positive
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaEnsembleLoss
from fedkd.losses.divergence import check_teachers, kl_to_teachers, prior, reweighted
from fedkd.losses.inputs import loss_function
from fedkd.losses.kd import comparable
from fedkd.losses.min_norm import one_class, shortest, shortest_there

Solver = Literal["exact", "svm"]


@loss_function("aekd")
def aekd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: Positive = 4.0,
    nu: Part | None = None,
    normalise: bool = False,
    solver: Solver = "exact",
) -> Tensor:
    """T^2 * mean of KL(teacher || student), weighted by `agreement_weights`, per sample -> (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        weights: What else speaks for each teacher on each sample, (M, B); None: nothing.
        temperature: Softness of all distributions.
        nu: Share of the teachers that must get a weight: no weight exceeds 1 / (nu * M). The
            paper's tolerance C is nu = 1 / (C * M). None sets no limit.
        normalise: Compare directions of the gradients and not their lengths.
        solver: "svm" runs the repository's one-class support vector machine, which ends
            before the least; "exact" does not.
    """
    check_teachers("aekd", student_logits, teacher_logits, weights)
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    scores = agreement_weights(
        student_logits,
        teacher_logits,
        weights=weights,
        temperature=temperature,
        nu=nu,
        normalise=normalise,
        solver=solver,
    )
    shares = reweighted(prior(weights, teacher_logits), scores[:, None])
    return kl_to_teachers(student_logits, teacher_logits, shares, temperature=temperature)


@torch.no_grad()
@loss_function("aekd")
def agreement_weights(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: Positive = 4.0,
    nu: Part | None = None,
    normalise: bool = False,
    solver: Solver = "exact",
) -> Tensor:
    """Weights, summing to one, that make the teachers' mean gradient shortest -> (M,).

    A teacher's gradient by the student's logits is T * (student's less its probabilities), here
    averaged over the batch, so one forward serves all teachers.

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        weights: Weight of each sample in a teacher's mean gradient, (M, B); a teacher without any
            gets none here. None: all the same.
        temperature: Softness of all distributions, as in `aekd_loss`.
        nu: Bounds the weights, by 1 / (nu * M).
        normalise: Whether only directions count.
        solver: "exact" or "svm".
    """
    check_teachers("aekd", student_logits, teacher_logits, weights)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "loss 'aekd': torch.func does not reach the solver of its weights; find them before "
            "with `agreement_weights`, and differentiate `weighted_kl` with them"
        )
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    weights = prior(weights, teacher_logits)
    total = weights.sum(dim=1)
    if solver == "exact" and weights.device.type not in ("cpu", "mps"):
        return _on_device(student_logits, teacher_logits, weights, temperature, nu, normalise)
    present = (total > 0).nonzero()[:, 0]
    weights = weights[present] / total[present, None]
    p = F.softmax(student_logits / temperature, dim=-1)
    q = F.softmax(teacher_logits[present] / temperature, dim=-1)
    gradients = weights @ p - torch.einsum("mb,mbc->mc", weights, q)
    # Over B, as of a mean loss: to the exact solver it is all one, not to the other.
    vectors = gradients.double().mul_(temperature / len(p))
    lengths = vectors.norm(dim=1)
    if normalise:
        vectors = vectors / lengths.clamp(min=1e-30)[:, None]
    gram = (vectors @ vectors.T).cpu().numpy()
    count = len(gram)
    nu = 1 / count if nu is None else min(max(nu, 1 / count), 1.0)
    found = shortest(gram, 1 / (nu * count)) if solver == "exact" else one_class(gram, nu)
    scores = torch.from_numpy(found).to(lengths.device)
    if normalise and lengths.all():
        scores = scores / lengths
        scores = scores / scores.sum()
    return total.new_zeros(len(total)).index_copy_(0, present, scores.to(total.dtype))


def _on_device(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    temperature: float,
    nu: float | None,
    normalise: bool,
) -> Tensor:
    """`agreement_weights` to six digits, with nothing fetched from the device."""
    total = weights.sum(dim=1)
    present = total > 0
    weights = weights / torch.where(present, total, 1)[:, None]
    p = F.softmax(student_logits / temperature, dim=-1)
    q = F.softmax(teacher_logits / temperature, dim=-1)
    vectors = (weights @ p - torch.einsum("mb,mbc->mc", weights, q)).double()
    lengths = vectors.norm(dim=1)
    if normalise:
        vectors = vectors / lengths.clamp(min=1e-30)[:, None]
    scores = shortest_there(vectors @ vectors.T, present, nu)
    if normalise:
        turned = torch.where(present, scores / torch.where(lengths > 0, lengths, 1), 0)
        turned = turned / turned.sum()
        scores = torch.where((lengths > 0).logical_or(~present).all(), turned, scores)
    return scores.to(total.dtype)


@LOSSES.register("aekd")
class AEKDLoss(FormulaEnsembleLoss, formula=aekd_loss):
    """Matches all teachers with weights whose mean gradient is shortest: where all can agree.

    It is a step that no teacher minds, and there is nothing to learn where teachers pull in
    opposite directions. Weights hold for a whole batch.

    References:
        Du et al., "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient
            Space", NeurIPS 2020,
            https://proceedings.neurips.cc/paper/2020/hash/91c77393975889bd08f301c9e13a44b7-Abstract.html
    """
