"""Optimal transport: between distributions over classes (Sinkhorn), and between Gaussians."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkd.functional.analytic_grad import through, transformed
from fedkd.functional.options import Count, Positive, options_checked
from fedkd.functional.precision import full_precision

_Options = tuple[int, float, Tensor | None]  # iterations, floor, without


@full_precision
@options_checked("transport")
def transport_cost(
    source: Tensor,
    target: Tensor,
    costs: Tensor,
    *,
    epsilon: Positive = 0.05,
    iterations: Count = 10,
    floor: float = 1e-8,
    without: Tensor | None = None,
    debiased: bool = False,
) -> Tensor:
    """Cost of entropic transport after a few Sinkhorn steps, (B, C) x (B, C) x (C, C) -> (B,).

    The gradient is that of the unrolled steps, as in the published loss: their number is part of
    the value. At the end rows sum to `source` exactly, columns to `target` only nearly.

    Args:
        source: Probabilities, with gradient.
        target: Probabilities, with gradient.
        costs: Cost of moving mass from class i to class j, the same for all samples; gets no
            gradient.
        epsilon: Strength of the entropy.
        iterations: Steps; each scales the columns, then the rows.
        floor: Added to every denominator.
        without: A class per sample that takes no part, (B,); the probabilities must be 0 there.
        debiased: Subtract half the cost from either distribution to itself, so that equal
            distributions cost nothing.

    Raises:
        ValueError: there are no iterations.

    References:
        Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NIPS 2013,
            https://arxiv.org/abs/1306.0895
        Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
            Distillation", NeurIPS 2024, https://arxiv.org/abs/2412.08139
    """
    if debiased:
        source, target = torch.cat([source, source, target]), torch.cat([target, source, target])
        without = None if without is None else without.repeat(3)
    options = costs.detach().to(source.dtype), epsilon, (iterations, floor, without)
    if transformed(source, target):
        cost = _unrolled(source, target, *options)
    else:
        cost = _Sinkhorn.apply(source, target, *options)
    if debiased:
        between, ours, theirs = cost.chunk(3)
        return between - (ours + theirs) / 2
    return cost


@full_precision
@options_checked("transport")
def sinkhorn_plan(
    source: Tensor,
    target: Tensor,
    costs: Tensor,
    *,
    epsilon: Positive = 0.05,
    iterations: Count = 10,
    floor: float = 1e-8,
    without: Tensor | None = None,
) -> Tensor:
    """The plan whose cost `transport_cost` gives, (B, C, C): mass from class i to class j."""
    kernel = (costs.to(source.dtype) / -epsilon).exp()
    column_sums, row_sums = _sums(source, target, kernel, (iterations, floor, without))[-1]
    columns, rows = target / column_sums, source / row_sums
    return rows[:, :, None] * kernel * columns[:, None, :]


def _unrolled(
    source: Tensor, target: Tensor, costs: Tensor, epsilon: float, options: _Options
) -> Tensor:
    """`transport_cost` for autograd, which keeps all steps."""
    kernel = (costs / -epsilon).exp()
    column_sums, row_sums = _sums(source, target, kernel, options)[-1]
    columns, rows = target / column_sums, source / row_sums
    return (rows * (columns @ (kernel * costs).T)).sum(dim=1)


class _Sinkhorn(torch.autograd.Function):
    """One kernel for all samples, and the gradient through the steps by hand.

    The published code copies the kernel for every sample: B C^2 numbers, and products that wait
    for memory. Here memory is C^2 + 2 B C per step, and the gradient is found at once, so nothing
    but (B, C) is kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, target: Tensor, costs: Tensor, epsilon: float, options: _Options
    ) -> Tensor:
        kernel = (costs / -epsilon).exp()
        priced = kernel * costs
        steps = _sums(source, target, kernel, options)
        column_sums, row_sums = steps.pop()
        columns, rows = target / column_sums, source / row_sums
        # What one more unit of each row scaling would cost.
        by_rows = columns @ priced.T
        value = (rows * by_rows).sum(dim=1)
        ctx.options = costs, epsilon, options
        to_source, to_target = ctx.needs_input_grad[:2]
        if not (to_source or to_target):
            return value
        by_source, by_target = by_rows / row_sums, torch.zeros_like(target)
        # What one more unit of each column scaling would save; so no sign need be changed.
        saved = torch.addmm(rows @ priced, by_rows.mul_(rows).div_(row_sums), kernel, beta=-1)
        back = kernel.T
        while True:
            if to_target:
                by_target.addcdiv_(saved, column_sums, value=-1)
            if not steps:
                break
            by_rows = saved.mul_(columns).div_(column_sums) @ back
            column_sums, row_sums = steps.pop()
            by_source.addcdiv_(by_rows, row_sums)
            if not steps and not to_target:
                break
            columns, rows = target / column_sums, source / row_sums
            saved = by_rows.mul_(rows).div_(row_sums) @ kernel
        ctx.save_for_backward(source, target, by_source, by_target)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, target, *found = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = through(lambda p, q: _unrolled(p, q, *ctx.options), (source, target), grad)
        else:
            gradients = [
                by * grad[:, None] if needed else None
                for by, needed in zip(found, ctx.needs_input_grad)
            ]
        return *gradients, None, None, None


def _sums(
    source: Tensor, target: Tensor, kernel: Tensor, options: _Options
) -> list[tuple[Tensor, Tensor]]:
    """What each step divides the target, then the source by, each (B, C).

    The quotients, the scalings of columns and rows, are not kept: half the memory, and to divide
    again costs next to nothing.
    """
    iterations, floor, without = options
    floors, back = torch.full_like(source, floor), kernel.T
    # Rows start with equal scalings, so their first sums need no product.
    column_sums = kernel.sum(dim=0).expand_as(source)
    classes = source.shape[1]
    if without is not None:
        # Nothing goes to that class, so what its 0 is divided by only must not be 0.
        column_sums = (column_sums - kernel[without]).scatter_(1, without[:, None], 1)
        classes -= 1
    column_sums = column_sums / classes + floor
    steps: list[tuple[Tensor, Tensor]] = []
    for _ in range(iterations):
        if steps:
            column_sums = torch.addmm(floors, source / steps[-1][1], kernel)
        steps.append((column_sums, torch.addmm(floors, target / column_sums, back)))
    return steps


@full_precision
def bures_distance(points: Tensor, covariance: Tensor) -> Tensor:
    """Squared distance of two covariances, (B, D, n) x (B, D, D) -> (B,), in double precision.

    With S = X X^T of the points X it is tr S + tr T - 2 tr (T^1/2 S T^1/2)^1/2: what transport
    between Gaussians costs beyond the distance of their means. The last trace is taken from the
    eigenvalues of X^T T X or T^1/2 S T^1/2, whichever is smaller. Eigenvalues that are zero but for
    rounding count as zero and pass no gradient, so covariances may lack rank.

    Args:
        points: Columns X whose products are one covariance, with gradient.
        covariance: The other one, T; gets no gradient.
    """
    points, covariance = points.double(), covariance.detach().double()
    # Eigenvalues of NaN are an error of LAPACK's, which says nothing of it.
    broken = ~(
        points.isfinite().flatten(1).all(dim=1) & covariance.isfinite().flatten(1).all(dim=1)
    )
    points = points.masked_fill(broken[:, None, None], 0)
    covariance = covariance.masked_fill(broken[:, None, None], 0)
    if points.shape[2] > points.shape[1]:
        values, vectors = torch.linalg.eigh(covariance)
        half = values.clamp(min=0).sqrt()[:, :, None] * vectors.transpose(1, 2)
        crossed = half @ points
        gram = crossed @ crossed.transpose(1, 2)
    else:
        gram = points.transpose(1, 2) @ covariance @ points
    values = torch.linalg.eigvalsh(gram)
    least = gram.shape[1] * torch.finfo(values.dtype).eps * values[:, -1:].detach().clamp(min=0)
    roots = torch.where(values > least, values, 1).sqrt()
    overlap = torch.where(values > least, roots, 0).sum(dim=1)
    traces = points.square().sum(dim=(1, 2)) + covariance.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (traces - 2 * overlap).masked_fill(broken, torch.nan)
