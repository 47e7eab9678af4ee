"""Centred kernel alignment of embeddings."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedkd.functional.options import Positive
from fedkd.functional.similarity import linear_cka, rbf_cka, unbiased_cka
from fedkd.knowledge.kinds import Pooled
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function

Similarity = Literal["linear", "rbf", "unbiased"]


@loss_function("cka")
def cka_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    weights: Tensor | None = None,
    similarity: Similarity = "linear",
    sigma: Positive = 1.0,
) -> Tensor:
    """1 - CKA of the two embeddings of a batch, (B, D) x (B, E) -> scalar.

    Args:
        student_features: (B, D).
        teacher_features: (B, E); the widths need not agree.
        weights: This teacher's weight on each sample, (B,): CKA under them as a measure, times
            their mean; ones if None.
        similarity: `linear`; `rbf` with Gaussian kernels; `unbiased` linear, which does not call
            small batches of wide embeddings alike (four samples or more).
        sigma: Width of the Gaussian kernels in roots of the median squared distance.
    """
    check_batch("cka", student_features, teacher_features, weights=weights)
    teacher_features = teacher_features.detach().to(student_features)
    if similarity == "linear":
        alike = linear_cka(student_features, teacher_features, weights=weights)
    elif similarity == "rbf":
        alike = rbf_cka(student_features, teacher_features, sigma=sigma, weights=weights)
    else:
        alike = unbiased_cka(student_features, teacher_features, weights=weights)
    return 1 - alike if weights is None else weights.to(alike).mean() * (1 - alike)


@LOSSES.register("cka")
class CKALoss(FormulaLoss, formula=cka_loss):
    """Makes the student's embeddings of a batch lie to each other as the teacher's do.

    Widths, rotation and scale do not matter, so nothing is projected. The published measure taken
    as a loss; there is no one code to repeat.

    References:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
            https://arxiv.org/abs/1905.00414
        Zhou et al., "Rethinking Centered Kernel Alignment in Knowledge Distillation", IJCAI 2024,
            https://arxiv.org/abs/2401.11824
    """

    needs = (Pooled(),)
