"""Wasserstein distillation of logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.optimal_transport import transport_cost
from fedkd.functional.options import Count, NotNegative, Positive
from fedkd.functional.precision import full
from fedkd.functional.similarity import sharpened
from fedkd.knowledge.kinds import ClassCosts, Kind, Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, class_numbers, loss_function


@loss_function("wkd_l")
def wkd_l_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None,
    costs: Tensor,
    *,
    transport_weight: float = 200.0,
    temperature: Positive = 8.0,
    kappa: NotNegative = 1.0,
    epsilon: Positive = 0.05,
    iterations: Count = 10,
    separate_target: bool = True,
    debiased: bool = False,
) -> Tensor:
    """-q[y] log p[y] + transport_weight * W(p', q') per sample, (B, C) x (B, C) -> (B,).

    p and q are the student's and the teacher's probabilities; p' and q' those over the classes
    other than y, at `temperature`. Half precision is computed in float32; the teacher is detached.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        targets: Classes y, (B,); unused without `separate_target`.
        costs: How unlike the classes are, (C, C), before `kappa`.
        transport_weight: Weight of the transport against the target's part (lambda); as published
            along with WKD-F. Alone the paper takes 600, and 25 to 200 for other pairs.
        temperature: Softness of both distributions in the transport; 2 on ImageNet.
        kappa: Costs are 1 - exp(-kappa D); 0 takes D itself.
        epsilon: Strength of the entropy in the transport.
        iterations: Sinkhorn steps.
        separate_target: Transport among the classes other than the target, which gets a part of
            its own; else transport among all.
        debiased: Subtract half the transport of either side to itself, so that none is left to a
            student that repeats the teacher (not in the paper).

    Raises:
        ValueError: the target is to be separated, but there are no targets.
    """
    check_batch("wkd_l", student_logits, teacher_logits, classes=student_logits.shape[-1])
    classes = student_logits.shape[1]
    if costs.shape != (classes, classes):
        raise ValueError(
            f"loss 'wkd_l': costs must be {(classes, classes)}, got {tuple(costs.shape)}"
        )
    if separate_target and targets is not None:
        targets = class_numbers("wkd_l", targets, student_logits)
    student_logits = full(student_logits)
    teacher_logits = teacher_logits.detach().to(student_logits.dtype)
    costs = sharpened(costs.to(student_logits.dtype), kappa)
    ours, theirs = student_logits / temperature, teacher_logits / temperature
    if not separate_target:
        targets = None
    elif targets is None:
        raise ValueError("loss 'wkd_l': separate_target needs targets")
    else:
        ours, theirs = (z.scatter(1, targets[:, None], -torch.inf) for z in (ours, theirs))
    transport = transport_weight * transport_cost(
        ours.softmax(dim=1),
        theirs.softmax(dim=1),
        costs,
        epsilon=epsilon,
        iterations=iterations,
        without=targets,
        debiased=debiased,
    )
    if targets is None:
        return transport
    belief = teacher_logits.softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    surprise = F.cross_entropy(student_logits, targets, reduction="none")
    return transport + torch.where(belief == 0, 0, belief * surprise)


@LOSSES.register("wkd_l")
class WKDLogitLoss(DistillationLoss, formula=wkd_l_loss):
    """Moves the student's probabilities to the teacher's, less far between classes that are alike.

    The transport is Sinkhorn's after a few steps, which are part of the published loss. It is no
    divergence: a student that repeats the teacher still has some loss and gradient. A student that
    is sure of something else gets no gradient from it. Needs labels for `separate_target`.

    Args:
        cost: Where the teacher's D comes from: angles between its classifier's `classifier`
            weights, or 1 - CKA of its `features` or `logits` (`ClassCosts`).
        formula: Options of `wkd_l_loss`.

    References:
        Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
            Distillation", NeurIPS 2024, https://arxiv.org/abs/2412.08139
    """

    needs: tuple[Kind, ...] = (Logits(), ClassCosts())

    def __init__(
        self, *, cost: Literal["classifier", "features", "logits"] = "classifier", **formula: Any
    ) -> None:
        super().__init__(**formula)
        self.needs = (Logits(), ClassCosts(cost))
        self.needs_targets = self.options.separate_target

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        return wkd_l_loss(
            student[Logits()],
            teacher[Logits()],
            targets,
            teacher[self.needs[1]],
            **vars(self.options),
        )
