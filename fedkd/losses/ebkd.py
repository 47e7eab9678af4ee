"""Several teachers, the surer the more."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.options import Positive
from fedkd.functional.precision import full
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaEnsembleLoss
from fedkd.losses.divergence import Scale, check_teachers, kl_to_teachers, prior, reweighted
from fedkd.losses.inputs import loss_function
from fedkd.losses.kd import comparable, floored


@loss_function("ebkd")
def ebkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: Positive = 4.0,
    entropy_temperature: Positive = 1.0,
    scale: Scale = "normalised",
) -> Tensor:
    """T^2 * mean of KL(teacher || student), weighted by sureness, per sample -> (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        weights: What else speaks for each teacher on each sample, (M, B); None: nothing.
        temperature: Softness of the distributions that are matched.
        entropy_temperature: Softness of those whose entropy is compared.
        scale: "normalised": weights of a sample sum to one. "published" multiplies by
            (M - 1) / M, as the repository's weights and divisors come to.
    """
    check_teachers("ebkd", student_logits, teacher_logits, weights)
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    shares = entropy_weights(teacher_logits, weights=weights, temperature=entropy_temperature)
    if scale == "published":
        count = len(teacher_logits)
        shares = shares * ((count - 1) / count)
    return kl_to_teachers(student_logits, teacher_logits, shares, temperature=temperature)


@torch.no_grad()
@loss_function("ebkd")
def entropy_weights(
    teacher_logits: Tensor, *, weights: Tensor | None = None, temperature: Positive = 1.0
) -> Tensor:
    """1 - H / (sum of all H) of each teacher, made to sum to one, (M, B, C) -> (M, B).

    The entropy H comes from log-probabilities, where the published code takes 0 * log 0.

    Args:
        teacher_logits: (M, B, C).
        weights: What fusion says, (M, B): multiplies the result; a teacher without weight counts
            as absent.
        temperature: Of the distributions whose entropy is taken.
    """
    teacher_logits = full(teacher_logits)
    weights = prior(weights, teacher_logits)
    log_p = floored(F.log_softmax(teacher_logits / temperature, dim=-1))
    entropy = log_p.exp().mul_(log_p).sum(dim=-1).neg_()
    entropy.masked_fill_(weights <= 0, 0)
    share = entropy / entropy.sum(dim=0).clamp(min=torch.finfo(entropy.dtype).tiny)
    return reweighted(weights, 1 - share)


@LOSSES.register("ebkd")
class EBKDLoss(FormulaEnsembleLoss, formula=ebkd_loss):
    """Matches all teachers, on each sample those more that are surer of it.

    References:
        Kwon et al., "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020,
            https://doi.org/10.1109/ICASSP40776.2020.9054698
    """
