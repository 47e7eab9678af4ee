"""Wasserstein losses and CKA against literal transcriptions of the published computation.

`wkd_cases(B, C)` gives what `benchmarks/losses.py` measures: name, ours, the literal one; each
draws forward and backward in float32. Feature maps are those of resnet32x4, 256 x 8 x 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.feature_statistics import cell_statistics, spatial_moments
from fedkd.functional.similarity import angle_costs
from fedkd.losses.cka import cka_loss
from fedkd.losses.wkd_f import wkd_f_loss
from fedkd.losses.wkd_l import wkd_l_loss

Run = Callable[[], object]


def published_wkd_l(student: Tensor, teacher: Tensor, targets: Tensor, costs: Tensor) -> Tensor:
    """WKD-L as published: costs and kernel copied for every sample, steps unrolled."""
    size, classes = student.shape
    target = targets[:, None]
    belief = teacher.softmax(dim=1).gather(1, target)
    found = -(belief * student.log_softmax(dim=1).gather(1, target)).mean()
    keep = torch.ones_like(student).scatter_(1, target, 0).bool()
    costs = (1 - torch.exp(-costs)).repeat(size, 1, 1)[keep[:, None] * keep[:, :, None]]
    costs = F.relu(costs.reshape(size, classes - 1, classes - 1)) + 1e-8
    p, q = ((z[keep].reshape(size, -1, 1) / 8).softmax(dim=1) for z in (student, teacher))
    kernel = torch.exp(-costs / 0.05)
    transposed = kernel.transpose(2, 1)
    u = torch.ones_like(p) / (classes - 1)
    for _ in range(10):
        v = q / (torch.bmm(transposed, u) + 1e-8)
        u = p / (torch.bmm(kernel, v) + 1e-8)
    flow = u * kernel * v.reshape(size, 1, -1)
    return found + 200 * (flow * costs).sum(-1).sum(-1).mean()


def published_cells(maps: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation per cell as published: cell by cell, each slice on its own."""
    if grid == 1:
        return maps.mean(dim=(-1, -2)), torch.sqrt(maps.var(dim=(-1, -2)) + 1e-5)
    height, width = maps.shape[2:]
    means, deviations = (maps.new_zeros(*maps.shape[:2], grid, grid) for _ in range(2))
    for i in range(grid):
        rows = slice(math.floor(i * height / grid), math.ceil((i + 1) * height / grid))
        for j in range(grid):
            columns = slice(math.floor(j * width / grid), math.ceil((j + 1) * width / grid))
            cell = maps[:, :, rows, columns]
            means[:, :, i, j] = cell.mean(dim=(-1, -2))
            deviations[:, :, i, j] = torch.sqrt(cell.var(dim=(-1, -2)) + 1e-5)
    return means, deviations


def published_wkd_f(student: Tensor, teacher: Tensor, grid: int) -> Tensor:
    """WKD-F as published, on projected maps."""
    pairs = zip(published_cells(student, grid), published_cells(teacher, grid))
    mean, spread = (F.mse_loss(s, t, reduction="sum") / (grid**2 * len(s)) for s, t in pairs)
    return 4 * mean + spread


def square_root_wkd_f(student: Tensor, teacher: Tensor) -> Tensor:
    """The same with full covariances, the trace of the root from D x D eigenvalues."""
    means, points = zip(
        *((z.mean(dim=2), z - z.mean(dim=2, keepdim=True)) for z in map(_flat, (student, teacher)))
    )
    ours, theirs = (x @ x.transpose(1, 2) / x.shape[2] for x in points)
    values, vectors = torch.linalg.eigh(theirs)
    root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.transpose(1, 2)
    eye = 1e-6 * torch.eye(root.shape[1])
    overlap = torch.linalg.eigvalsh(root @ ours @ root + eye).clamp(min=1e-12).sqrt().sum(dim=1)
    traces = (ours + theirs).diagonal(dim1=1, dim2=2).sum(dim=1)
    return (4 * (means[0] - means[1]).square().sum(dim=1) + traces - 2 * overlap).mean()


def published_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - linear CKA as published: Gram matrices between two centring matrices."""

    def centring(gram: Tensor) -> Tensor:
        n = len(gram)
        centre = torch.eye(n) - torch.ones(n, n) / n
        return torch.mm(torch.mm(centre, gram), centre)

    def hsic(x: Tensor, y: Tensor) -> Tensor:
        return torch.sum(centring(x @ x.T) * centring(y @ y.T))

    norms = [torch.sqrt(hsic(z, z).clamp(min=1e-12)) for z in (student, teacher)]
    return 1 - hsic(student, teacher) / (norms[0] * norms[1])


def wkd_cases(size: int, classes: int) -> list[tuple[str, Run, Run]]:
    """Name, ours and the literal one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student, teacher = 3 * draw(2, size, classes)
    targets, costs = torch.arange(size) % classes, angle_costs(draw(classes, 256))
    ours, theirs = draw(2, size, 256, 8, 8)

    def step(loss: Callable[[Tensor], Tensor], start: Tensor) -> Run:
        def run() -> None:
            loss(start.clone().requires_grad_()).mean().backward()

        return run

    # Statistics of the teacher are taken in both, though ours come ready from the client.
    def statistics(grid: int) -> tuple[str, Run, Run]:
        return (
            f"WKD-F, grid {grid}",
            step(lambda x: wkd_f_loss(x, cell_statistics(theirs, grid)), ours),
            step(lambda x: published_wkd_f(x, theirs, grid), ours),
        )

    return [
        (
            "WKD-L",
            step(lambda x: wkd_l_loss(x, teacher, targets, costs), student),
            step(lambda x: published_wkd_l(x, teacher, targets, costs), student),
        ),
        statistics(1),
        statistics(4),
        (
            "WKD-F, full covariance",
            step(lambda x: wkd_f_loss(x, spatial_moments(theirs)), ours),
            step(lambda x: square_root_wkd_f(x, theirs), ours),
        ),
        (
            "CKA",
            step(lambda x: cka_loss(x, _flat(theirs).mean(dim=2)), _flat(ours).mean(dim=2)),
            step(lambda x: published_cka(x, _flat(theirs).mean(dim=2)), _flat(ours).mean(dim=2)),
        ),
    ]


def _flat(maps: Tensor) -> Tensor:
    return maps.flatten(2)
