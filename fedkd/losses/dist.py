"""Knowledge distillation from a stronger teacher: correlations instead of divergences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.analytic_grad import with_gradient
from fedkd.functional.options import Positive
from fedkd.knowledge.kinds import Logits
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss
from fedkd.losses.inputs import check_batch, loss_function
from fedkd.losses.kd import comparable

EpsMode = Literal["add", "clamp"]

# Lengths of vectors less their mean, relative to those with it, that float32 holds to five digits.
_PRECISE = 1e-2


@loss_function("dist")
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: Positive = 4.0,
    tau_sq: bool = True,
    eps_mode: EpsMode = "clamp",
    eps: Positive = 1e-8,
) -> Tensor:
    """beta * (1 - correlation of samples) + gamma * (1 - correlation of classes), a scalar.

    Args:
        student_logits: (B, C); half precision is computed in float32.
        teacher_logits: (B, C), detached.
        weights: This teacher's weight on each sample, (B,); ones if None. Classes are correlated
            over samples so weighted, and count the weights' mean.
        class_weights: Weights of the teacher's view of each class, (C,); ones if None.
        beta: Weight of the samples' correlations (the paper's inter-class relation).
        gamma: Weight of the classes' correlations (the paper's intra-class relation).
        temperature: Softness of both distributions; the authors' CIFAR runs use 4, those on
            ImageNet 1.
        tau_sq: Multiply by temperature^2, as the authors' code does and the paper does not.
        eps_mode: How a product of lengths is kept from zero: "clamp" clamps each length, and a
            correlation is exact; "add" adds `eps` to the product, as the authors' code does,
            which at temperature 1 swallows much of the classes' part.
        eps: The smallest length, or what is added.
    """
    check_batch(
        "dist",
        student_logits,
        teacher_logits,
        weights=weights,
        class_weights=class_weights,
        classes=student_logits.shape[-1],
    )
    student, teacher = comparable(student_logits, teacher_logits)
    problem = _Problem(
        inter=beta * (temperature**2 if tau_sq else 1.0),
        intra=gamma * (temperature**2 if tau_sq else 1.0),
        temperature=temperature,
        weights=None if weights is None else weights.detach(),
        class_weights=None if class_weights is None else class_weights.detach(),
        eps=eps,
        add=eps_mode == "add",
        noise=16 * torch.finfo(student.dtype).eps,
    )

    def solve(logits: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        both = torch.stack([logits, teacher])
        # Whether float32 does is only known when it is done, which an accelerator shall not tell.
        quick = logits.device.type in ("cpu", "mps")
        found = problem.solve(both, differentiate) if quick else None
        if found is None:
            found = problem.solve(both.double(), differentiate)
        assert found is not None
        value, gradient = found
        return value.to(logits.dtype), None if gradient is None else gradient.to(logits.dtype)

    return with_gradient(student, solve, lambda logits: problem.formula(logits, teacher))


@LOSSES.register("dist")
class DISTLoss(FormulaLoss, formula=dist_loss):
    """Correlates the probabilities of each sample over classes, and of each class over samples.

    References:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
            https://arxiv.org/abs/2205.10536
    """

    needs = (Logits(),)


@dataclass(frozen=True)
class _Problem:
    """What `dist_loss` is asked, and its answer in closed form.

    Attributes:
        inter: Weight of the samples' part.
        intra: Weight of the classes' part.
        temperature: Softness of both distributions.
        weights: Of each sample, (B,), or None.
        class_weights: Of each class, (C,), or None.
        eps: The smallest length, or what is added to their product.
        add: Whether it is added.
        noise: Vectors whose elements differ by less, relative to their size, are constant.
    """

    inter: float
    intra: float
    temperature: float
    weights: Tensor | None
    class_weights: Tensor | None
    eps: float
    add: bool
    noise: float

    def solve(self, logits: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None] | None:
        """Value and gradient for student and teacher, (2, B, C); None if float32 is too coarse."""
        _, size, classes = logits.shape
        both = F.softmax(logits / self.temperature, dim=2)
        row_share: Tensor | float = self.inter / size
        column_share: Tensor | float = self.intra / classes
        root: Tensor | None = None
        if self.weights is None:
            means = both.mean(dim=1, keepdim=True)
            columns = both - means
        else:
            weights = self.weights.to(both.dtype)
            mean_weight = weights.mean()
            metric = torch.where(mean_weight > 0, weights / mean_weight, 1)[:, None]
            root = metric.sqrt()
            means = (metric * both).mean(dim=1, keepdim=True)
            columns = (both - means).mul_(root)
            row_share, column_share = row_share * weights[:, None], column_share * mean_weight
        if self.class_weights is not None:
            column_share = column_share * self.class_weights.to(both.dtype)
        rows = self._distance(both - 1 / classes, 2, row_share, classes**-0.5)
        if rows is None:
            return None
        found = self._distance(columns, 1, column_share, means * size**0.5)
        if found is None:
            return None
        value, slope = rows[0] + found[0], rows[1]
        if not differentiate:
            return value, None
        slope += found[1] if root is None else found[1].mul_(root)
        p = both[0]
        slope -= (p * slope).sum(dim=1, keepdim=True)
        return value, slope.mul_(p).div_(self.temperature)

    def formula(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The value, correlation by correlation, for autograd."""
        wide = student.dtype if student.device.type == "mps" else torch.float64
        size, classes = student.shape
        p, q = (F.softmax(z.to(wide) / self.temperature, dim=1) for z in (student, teacher))
        rows = 1 - self._correlation(p - 1 / classes, q - 1 / classes, 1, classes**-0.5)
        mean_weight = rows.new_ones(())
        metric = weights = rows.new_ones(size)
        if self.weights is not None:
            weights = self.weights.to(wide)
            mean_weight = weights.mean()
            metric = torch.where(mean_weight > 0, weights / mean_weight, 1)
        means = [(metric[:, None] * z).mean(dim=0) for z in (p, q)]
        root = metric.sqrt()[:, None]
        columns = 1 - self._correlation(
            (p - means[0]) * root, (q - means[1]) * root, 0, *(z * size**0.5 for z in means)
        )
        gate = 1 if self.class_weights is None else self.class_weights.to(wide)
        inter, intra = self.inter * (weights * rows).mean(), self.intra * (gate * columns).mean()
        return (inter + mean_weight * intra).to(student.dtype)

    def _correlation(
        self, x: Tensor, y: Tensor, dim: int, size: Tensor | float, other: Tensor | None = None
    ) -> Tensor:
        """Of vectors less their means, which are constant if no longer than noise of `size`."""
        squares = [z.square().sum(dim=dim) for z in (x, y)]
        sizes = size, size if other is None else other
        flat = [square <= (self.noise * s) ** 2 for square, s in zip(squares, sizes)]
        a, b = (torch.where(no, 1, square).sqrt() for no, square in zip(flat, squares))
        length = a * b + self.eps if self.add else a.clamp(min=self.eps) * b.clamp(min=self.eps)
        return torch.where(flat[0] | flat[1], 0, (x * y).sum(dim=dim) / length)

    def _distance(
        self, both: Tensor, dim: int, share: Tensor | float, size: Tensor | float
    ) -> tuple[Tensor, Tensor] | None:
        """Sum of share * (1 - correlation), and its gradient by the student's vectors, (B, C).

        Args:
            both: Student's and teacher's vectors less their means, (2, B, C).
            dim: The axis that vectors lie along.
            share: How much each correlation counts.
            size: The vectors' length if they are nearly constant, with their means.
        """
        student, teacher = both
        dot = (student * teacher).sum(dim=dim - 1, keepdim=True)
        a, b = lengths = (both * both).sum(dim=dim, keepdim=True).sqrt_()
        coarse = both.dtype == torch.float32 and both.device.type != "mps"
        if coarse and bool((lengths < _PRECISE * size).any()):
            return None
        # What rounding leaves of equal numbers, less their mean, has no direction.
        lengths.masked_fill_(lengths <= self.noise * size, torch.inf)
        if self.add:
            inverse = (a * b + self.eps).reciprocal_()
            along = dot * inverse * (b / a).nan_to_num_(posinf=0)
        else:
            inverse = 1 / (a.clamp(min=self.eps) * b.clamp(min=self.eps))
            along = torch.where(a > self.eps, dot / (a * a), 0)
        share = share * torch.ones_like(dot)
        weight = share * inverse
        slope = (student * (weight * along)).addcmul_(teacher, weight, value=-1)
        return (share * (1 - dot * inverse)).sum(), slope
