"""Knowledge distillation from a stronger teacher: correlations instead of divergences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.closed_form import wanted, with_gradient
from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, Tensors, Trust
from fedkd.losses.kd import comparable

EpsMode = Literal["add", "clamp"]


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    tau_sq: bool = True,
    eps_mode: EpsMode = "clamp",
    eps: float = 1e-8,
) -> Tensor:
    """beta * (1 - correlation of samples) + gamma * (1 - correlation of classes), a scalar.

    Args:
        student_logits: (B, C); half precision is computed in float32.
        teacher_logits: (B, C), detached.
        weights: This teacher's weight on each sample, (B,); ones if None. Classes are correlated
            over samples so weighted, and count the weights' mean.
        class_weights: Trust in the teacher's view of each class, (C,); ones if None.
        beta: As in `DISTLoss`, like all that follow.
        gamma: See there.
        temperature: See there.
        tau_sq: See there.
        eps_mode: See there.
        eps: See there.
    """
    student, teacher = comparable(student_logits, teacher_logits)
    size, classes = student.shape
    scale = temperature**2 if tau_sq else 1.0
    add = eps if eps_mode == "add" else None
    both = F.softmax(torch.stack([student.detach(), teacher]).div_(temperature), dim=2)
    # What rounding leaves of equal numbers, less their mean, has no direction.
    noise = 16 * torch.finfo(both.dtype).eps
    row_share: Tensor | float = beta * scale / size
    column_share: Tensor | float = gamma * scale / classes
    root: Tensor | None = None
    if weights is None:
        means = both.mean(dim=1, keepdim=True)
        columns = both - means
    else:
        weights = weights.detach().to(both.dtype)
        trust = weights.mean()
        metric = torch.where(trust > 0, weights / trust, 1)[:, None]
        root = metric.sqrt()
        means = (metric * both).mean(dim=1, keepdim=True)
        columns = (both - means).mul_(root)
        row_share, column_share = row_share * weights[:, None], column_share * trust
    if class_weights is not None:
        column_share = column_share * class_weights.detach().to(both.dtype)
    rows = both - 1 / classes
    inter, row_slope = _distance(rows, 2, row_share, eps, add, noise / classes**0.5)
    intra, column_slope = _distance(columns, 1, column_share, eps, add, means * (noise * size**0.5))
    if not wanted(student):
        return inter + intra
    slope = row_slope.add_(column_slope if root is None else column_slope.mul_(root))
    p = both[0]
    gradient = slope.sub_((p * slope).sum(dim=1, keepdim=True)).mul_(p).div_(temperature)
    return with_gradient(student, inter + intra, gradient)


@LOSSES.register("dist")
class DISTLoss(DistillationLoss):
    """Correlates the probabilities of each sample over classes, and of each class over samples.

    Args:
        beta: Weight of the samples' correlations (the paper's inter-class relation).
        gamma: Weight of the classes' correlations (the paper's intra-class relation).
        temperature: Softness of both distributions; the authors' CIFAR runs use 4, those on
            ImageNet 1.
        tau_sq: Multiply by temperature^2, as the authors' code does and the paper does not.
        eps_mode: How a product of lengths is kept from zero: "clamp" clamps each length, and a
            correlation is exact; "add" adds `eps` to the product, as the authors' code does,
            which at temperature 1 swallows much of the classes' part.
        eps: The smallest length, or what is added.

    References:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
            https://arxiv.org/abs/2205.10536
    """

    needs = (Logits(),)

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
        tau_sq: bool = True,
        eps_mode: EpsMode = "clamp",
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"loss 'dist': temperature must be positive, got {temperature}")
        if eps <= 0:
            raise ValueError(f"loss 'dist': eps must be positive, got {eps}")
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.tau_sq = tau_sq
        self.eps_mode: EpsMode = eps_mode
        self.eps = eps

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: Trust
    ) -> Tensor:
        """Scalar loss, `trust` applied."""
        return dist_loss(
            student[Logits()],
            teacher[Logits()],
            weights=trust.samples,
            class_weights=trust.classes,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            tau_sq=self.tau_sq,
            eps_mode=self.eps_mode,
            eps=self.eps,
        )


def _distance(
    both: Tensor,
    dim: int,
    share: Tensor | float,
    eps: float,
    add: float | None,
    noise: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Sum of share * (1 - correlation), and its gradient by the student's vectors, (B, C).

    Args:
        both: Student's and teacher's vectors less their means, (2, B, C).
        dim: The axis that vectors lie along.
        share: How much each correlation counts.
        eps: The smallest length.
        add: What is added to the product of lengths instead, or None.
        noise: Vectors that are not longer are zero, unless something is added.
    """
    student, teacher = both
    dot = (student * teacher).sum(dim=dim - 1, keepdim=True)
    lengths = (both * both).sum(dim=dim, keepdim=True).sqrt_()
    a, b = lengths
    if add is not None:
        inverse = (a * b + add).reciprocal_()
        along = torch.where(a > 0, dot * inverse * b / a, 0)
    else:
        lengths.masked_fill_(lengths <= noise, torch.inf)
        inverse = 1 / (a.clamp(min=eps) * b.clamp(min=eps))
        along = torch.where(a > eps, dot / (a * a), 0)
    correlation, share = dot * inverse, share * torch.ones_like(dot)
    weight = share * inverse
    slope = (student * (weight * along)).addcmul_(teacher, weight, value=-1)
    return (share * (1 - correlation)).sum(), slope
