"""Overhaul of feature distillation: partial distance of features around a margin."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedkd.functional.analytic_grad import transformed
from fedkd.functional.feature_statistics import averaged
from fedkd.functional.options import Count, Positive
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Kind, Stage
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import check_batch, loss_function


@loss_function("ofd")
def ofd_loss(
    student_map: Tensor, teacher_map: Tensor, margin: Tensor, *, scale: float = 1.0
) -> Tensor:
    """scale * sum (s - t')^2 where s > t' or t' > 0, with t' = max(t, margin), per sample, (B,).

    Where the teacher's neuron is silent (t' <= 0) the student's may be as silent as it likes.

    Args:
        student_map: Connected to the teacher's width, (B, D, h, w).
        teacher_map: Before its ReLU, (B, D, h, w).
        margin: What silence is, per channel, (D,) or (1, D, 1, 1).
        scale: Published is the plain sum, divided by B and by 1000 (CIFAR) or 10000 (ImageNet).
    """
    check_batch("ofd", student_map, teacher_map)
    if student_map.shape != teacher_map.shape or margin.numel() not in (1, student_map.shape[1]):
        raise ValueError(
            f"loss 'ofd': student {tuple(student_map.shape)}, teacher {tuple(teacher_map.shape)} "
            f"and margin {tuple(margin.shape)} do not fit"
        )
    student_map = full(student_map)
    teacher_map = teacher_map.detach().to(student_map.dtype)
    margin = margin.detach().to(teacher_map).view(1, -1, 1, 1)
    if transformed(student_map):
        return scale * _partial_distance(student_map, teacher_map, margin)
    distance: Tensor = _PartialDistance.apply(student_map, teacher_map, margin)
    return scale * distance


def _partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squares summed per sample, for autograd."""
    target = torch.maximum(teacher, margin)
    indifferent = (student <= target) & (target <= 0)
    return torch.where(indifferent, 0, student - target).square().flatten(1).sum(dim=1)


def ofd_margin(gamma: Tensor, beta: Tensor) -> Tensor:
    """Mean of the negative values of N(beta, gamma^2), -3 |gamma| if there are few, (D,) -> (D,).

    Args:
        gamma: Weight of the batch norm before the teacher's ReLU, (D,).
        beta: Its bias, (D,).
    """
    deviation, mean = gamma.detach().double().abs(), beta.detach().double()
    ratio = mean / deviation.clamp(min=1e-300)
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    expected = mean - deviation * density / below.clamp(min=0.001)
    return torch.where(below > 0.001, expected, -3 * deviation).to(gamma.dtype)


def negative_mean(maps: Tensor) -> Tensor:
    """Mean of each channel's negative values, 0 if it has none, (B, D, h, w) -> (D,)."""
    below = maps.clamp(max=0).sum(dim=(0, 2, 3))
    return below / (maps < 0).sum(dim=(0, 2, 3)).clamp(min=1)


@LOSSES.register("ofd")
class OFDLoss(DistillationLoss):
    """Matches the maps of several stages where the teacher's neurons are active.

    A teacher's larger map is averaged to the student's size.

    Args:
        stages: How many of the deepest stages; of L the i-th weighs 2^-(L - i - 1), the last 1.
        scale: Factor on the sum over all elements; 1e-3 as published on CIFAR.

    References:
        Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019,
            https://arxiv.org/abs/1904.01866
    """

    needs: tuple[Kind, ...] = (Stage(-3), Stage(-2), Stage(-1))

    def __init__(self, *, stages: Count = 3, scale: Positive = 1e-3) -> None:
        super().__init__()
        self.needs = tuple(Stage(index) for index in range(-stages, 0))
        self.scale = scale
        self.connectors = nn.ModuleList()

    def adapted(self, student: Tensors, teacher: Tensors) -> Self:
        """With connectors, and with margins taken from the teacher's example.

        The published margins come from a batch norm's weights, which approximate what is measured
        here; maps after a ReLU have margin 0.
        """
        ready = copy.deepcopy(self)
        ready.connectors = nn.ModuleList()
        for number, kind in enumerate(self.needs):
            ours, theirs = student[kind], teacher[kind]
            if ours.shape[2] > theirs.shape[2] or ours.shape[3] > theirs.shape[3]:
                raise ValueError(
                    f"loss 'ofd': {kind} of the student is {tuple(ours.shape[2:])}, "
                    f"larger than the teacher's {tuple(theirs.shape[2:])}"
                )
            ready.connectors.append(connector(ours.shape[1], theirs.shape[1]))
            margin = negative_mean(_like(theirs, ours).float())
            ready.register_buffer(f"margin{number}", margin)
        return ready

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        assert len(self.connectors) == len(self.needs), "adapt it to student and teacher first"
        losses = []
        for number, (kind, connect) in enumerate(zip(self.needs, self.connectors)):
            margin = self.get_buffer(f"margin{number}")
            losses.append(
                ofd_loss(
                    connect(student[kind].to(margin.dtype)),
                    _like(teacher[kind], student[kind]),
                    margin,
                    scale=self.scale / 2 ** (len(self.needs) - number - 1),
                )
            )
        return torch.stack(losses).sum(dim=0)


class _PartialDistance(torch.autograd.Function):
    """The same; makes one map for backward, where plain autograd makes four."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
        target = torch.maximum(teacher, margin)
        difference = student - target
        # One of the two is positive where the larger is.
        difference.mul_(torch.maximum(target, difference).gt_(0))
        ctx.save_for_backward(student, difference)
        flat = difference.flatten(1)
        return torch.linalg.vecdot(flat, flat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, difference = ctx.saved_tensors
        if torch.is_grad_enabled():  # the same number, as a function of the student's
            difference = difference + (student - student.detach()) * (difference != 0)
        return difference * (2 * grad).view(-1, 1, 1, 1), None, None


def connector(student_width: int, teacher_width: int) -> nn.Sequential:
    """Student's channels to the teacher's: 1x1 convolution without bias, batch norm."""
    convolution = nn.Conv2d(student_width, teacher_width, 1, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / teacher_width))
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher_width))


def _like(teacher_map: Tensor, student_map: Tensor) -> Tensor:
    """The teacher's map averaged to the student's size."""
    return averaged(teacher_map, (student_map.shape[2], student_map.shape[3]))
