"""Several teachers, those more that are right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.functional.options import Count, Positive
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Classifier, Kind, Logits, Stage
from fedkd.knowledge.payload import Ensemble
from fedkd.losses import LOSSES
from fedkd.losses.base import EnsembleLoss, Tensors
from fedkd.losses.divergence import (
    Scale,
    check_teachers,
    kl_to_teachers,
    prior,
    reweighted,
    squared_distances,
)
from fedkd.losses.inputs import check_batch, class_numbers, loss_function
from fedkd.losses.kd import comparable
from fedkd.models.projectors import embedding


@loss_function("camkd")
def camkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: Positive = 4.0,
    scale: Scale = "normalised",
) -> Tensor:
    """T^2 * mean of KL(teacher || student), weighted by `confidence_weights`, per sample -> (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        targets: Class indices, (B,).
        weights: What else speaks for each teacher on each sample, (M, B); None: nothing.
        temperature: Softness of the distributions that are matched.
        scale: "normalised": weights of a sample sum to one. "published" divides by the number of
            teachers.
    """
    check_teachers("camkd", student_logits, teacher_logits, weights)
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    shares = confidence_weights(teacher_logits, targets, weights=weights)
    if scale == "published":
        shares = shares / len(teacher_logits)
    return kl_to_teachers(student_logits, teacher_logits, shares, temperature=temperature)


@loss_function("camkd")
def camkd_feature_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    answers: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    through_weights: bool = False,
    scale: Scale = "normalised",
) -> Tensor:
    """Mean squared distance of maps, weighted by `confidence_weights`, per sample -> (B,).

    Args:
        student_maps: The student's map as projected for each of M teachers, (B, D, h, w) each.
        teacher_maps: The teachers' maps, of the same shapes.
        answers: What each teacher's classifier makes of the student's projected map, (M, B, C).
        targets: Class indices, (B,).
        weights: What else speaks for each teacher on each sample, (M, B); None: nothing.
        through_weights: Let gradients flow through the weights too, as published: the student
            then also learns to look worse to teachers far from it.
        scale: As in `camkd_loss`.
    """
    check_teachers("camkd", answers[0], answers, weights)
    for ours, theirs in zip(student_maps, teacher_maps, strict=True):
        check_batch("camkd", answers[0], ours, theirs)
    answers = full(answers)
    with torch.set_grad_enabled(through_weights and torch.is_grad_enabled()):
        shares = confidence_weights(answers, targets, weights=weights)
    loss = (shares * squared_distances(student_maps, teacher_maps)).sum(dim=0)
    return loss / len(shares) if scale == "published" else loss


def confidence_weights(
    teacher_logits: Tensor, targets: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """(1 - softmax of cross entropies over teachers) / (M - 1), (M, B, C) x (B,) -> (M, B).

    Weights of a sample sum to one, those of a single teacher are one (the published code divides
    by zero).

    Args:
        teacher_logits: (M, B, C).
        targets: Class indices, (B,).
        weights: What fusion says, (M, B): multiplies the result; a teacher without weight counts
            as absent.
    """
    targets = class_numbers("camkd", targets, teacher_logits[0])
    weights = prior(weights, teacher_logits)
    # Of a target that a teacher masks the error is endless: its share is 0 and not NaN.
    log_p = F.log_softmax(teacher_logits, dim=-1).clamp(min=-1e30)
    errors = -log_p.gather(2, targets.expand(len(log_p), -1)[..., None])[..., 0]
    doubt = torch.softmax(errors.masked_fill(weights <= 0, -torch.inf), dim=0)
    return reweighted(weights, 1 - doubt)


@LOSSES.register("camkd")
class CAMKDLoss(EnsembleLoss, formula=camkd_loss):
    """Matches all teachers, on each sample those more that are right about it. Needs labels.

    Args:
        logit_weight: Weight of the logit part.
        feature_weight: Weight of the feature part (the paper's 50): the student's deepest map,
            projected for each teacher, against the teacher's. Asks for maps and classifiers.
        relu: Whether the projections end in a ReLU, as published. "auto" leaves it out for a
            teacher whose map has negative values.
        convs: Three convolutions per projection instead of one.
        factor: How many times narrower than the student's map these are in the middle.
        through_weights: Of the feature part, see `camkd_feature_loss`.
        formula: Options of `camkd_loss`, of which `scale` holds for both parts.

    References:
        Zhang et al., "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022,
            https://arxiv.org/abs/2201.00007
    """

    needs: tuple[Kind, ...] = (Logits(),)
    needs_targets = True

    def __init__(
        self,
        *,
        logit_weight: float = 1.0,
        feature_weight: float = 0.0,
        relu: bool | Literal["auto"] = "auto",
        convs: bool = False,
        factor: Count = 2,
        through_weights: bool = False,
        **formula: Any,
    ) -> None:
        super().__init__(**formula)
        if not logit_weight and not feature_weight:
            raise ValueError("loss 'camkd': logit_weight and feature_weight are both 0")
        if feature_weight:
            self.needs = (Logits(), Stage(-1), Classifier())
        self.logit_weight = logit_weight
        self.feature_weight = feature_weight
        self.relu: bool | Literal["auto"] = relu
        self.convs = convs
        self.factor = factor
        self.through_weights = through_weights
        self.projectors = nn.ModuleList()

    def adapted(self, student: Tensors, teachers: Sequence[Tensors]) -> Self:
        """With a projection of the student's deepest map for each teacher."""
        if not self.feature_weight:
            return self
        ready = copy.deepcopy(self)
        ours = student[Stage(-1)].shape[1:]
        for teacher in teachers:
            theirs, width = teacher[Stage(-1)], teacher[Classifier()].shape[1] - 1
            if theirs.shape[1] != width:
                raise ValueError(
                    f"loss 'camkd': a teacher's classifier takes {width} numbers, but its deepest "
                    f"map has {theirs.shape[1]} channels"
                )
            relu = bool((theirs >= 0).all()) if self.relu == "auto" else self.relu
            ready.projectors.append(
                embedding(ours, theirs.shape[1:], relu=relu, convs=self.convs, factor=self.factor)
            )
        return ready

    def forward(self, student: Tensors, ensemble: Ensemble, targets: Tensor | None) -> Tensor:
        """Losses (B,)."""
        assert targets is not None
        parts = []
        if self.logit_weight:
            part = camkd_loss(
                student[Logits()],
                ensemble.logits,
                targets,
                weights=ensemble.weights,
                **vars(self.options),
            )
            parts.append(self.logit_weight * part)
        if self.feature_weight:
            part = self._feature_part(student[Stage(-1)], ensemble, targets)
            parts.append(self.feature_weight * part)
        return torch.stack(parts).sum(dim=0)

    def _feature_part(self, maps: Tensor, ensemble: Ensemble, targets: Tensor) -> Tensor:
        assert len(self.projectors) == len(ensemble), "adapt it to student and teachers first"
        maps = maps.to(next(self.projectors.parameters()).dtype)
        projected = [project(maps) for project in self.projectors]
        answers = []
        for ours, classifier in zip(projected, ensemble.tensors[Classifier()]):
            classifier = classifier.to(ours.dtype)
            answers.append(F.linear(ours.mean(dim=(2, 3)), classifier[:, :-1], classifier[:, -1]))
        return camkd_feature_loss(
            projected,
            list(ensemble.tensors[Stage(-1)]),
            torch.stack(answers),
            targets,
            weights=ensemble.weights,
            through_weights=self.through_weights,
            scale=self.options.scale,
        )
