"""Losses on feature maps and class maps, and literal transcriptions of the published code.

Both sides start from the maps of student and teacher and draw forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.functional.feature_statistics import spectral_norms
from fedkd.losses.cat import cat_loss
from fedkd.losses.fitnet import fitnet_loss
from fedkd.losses.london import london_loss
from fedkd.losses.ofd import ofd_loss

Run = Callable[[], object]


def published_cat(student: Tensor, teacher: Tensor, size: int, normalise: bool) -> Tensor:
    """CAT as published: adaptive pooling, `normalize` over places, mean over all elements."""
    pooled = [F.adaptive_avg_pool2d(maps, (size, size)) for maps in (student, teacher)]
    if normalise:
        pooled = [F.normalize(maps, dim=(2, 3)) for maps in pooled]
    return F.mse_loss(pooled[0], pooled[1])


def published_london(
    student: Sequence[Tensor], teacher: Sequence[Tensor], iterations: int
) -> Tensor:
    """LONDON as published: each matrix made twice, gradient through all steps."""

    def matrix(first: Tensor, second: Tensor) -> Tensor:
        if first.size(2) > second.size(2):
            first = F.adaptive_avg_pool2d(first, (second.size(2), second.size(3)))
        first = first.view(first.size(0), first.size(1), -1)
        second = second.view(second.size(0), second.size(1), -1).transpose(1, 2)
        return torch.bmm(first, second) / first.size(2)

    def norm(gram: Tensor) -> Tensor:
        vector = torch.ones(gram.shape[0], gram.shape[1], 1)
        for _ in range(iterations):
            moved = torch.bmm(gram, vector)
            length = torch.norm(moved, dim=1).unsqueeze(1)
            vector = moved / length
        return torch.sqrt(length / torch.norm(vector, dim=1).unsqueeze(1))

    total = torch.zeros(())
    for i in range(len(student) - 1):
        norms = [
            norm(torch.bmm(matrix(s[i], s[i + 1]), matrix(s[i], s[i + 1]).transpose(2, 1)))
            for s in (student, teacher)
        ]
        total = total + F.mse_loss(norms[0], norms[1]) / 2 ** (len(student) - i - 1)
    return total


def published_ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """OFD's partial distance as published: all squares, then a mask."""
    target = torch.max(teacher, margin)
    squares = F.mse_loss(student, target, reduction="none")
    return (squares * ((student > target) | (target > 0)).float()).sum()


def feature_cases(size: int) -> list[tuple[str, Run, Run]]:
    """Name, ours and the published one, for a batch of `size`; maps of ResNet-32x4, 100 classes."""
    generator = torch.Generator().manual_seed(0)

    def pair(*shape: int) -> list[Tensor]:
        return list(torch.randn(2, size, *shape, generator=generator).unbind())

    def step(loss: Callable[..., Tensor], students: Sequence[Tensor]) -> Run:
        leaves = [maps.clone().requires_grad_() for maps in students]

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss(*leaves).backward()

        return run

    def case(
        name: str,
        students: Sequence[Tensor],
        ours: Callable[..., Tensor],
        published: Callable[..., Tensor],
    ) -> tuple[str, Run, Run]:
        return name, step(ours, students), step(published, students)

    maps, teacher_maps = pair(100, 8, 8)
    stages = [pair(64, 32, 32), pair(128, 16, 16), pair(256, 8, 8)]
    student, teacher = ([F.relu(both[side]) for both in stages] for side in (0, 1))
    wide, hint = stages[1]
    thin = wide[:, :64].clone()
    regress = nn.Sequential(nn.Conv2d(64, 128, 1), nn.BatchNorm2d(128), nn.ReLU())
    margin = -torch.rand(128, generator=generator)
    with torch.no_grad():
        sent = spectral_norms(teacher)

    def london(gradient: Literal["exact", "unrolled"], iterations: int) -> Callable[..., Tensor]:
        def loss(*leaves: Tensor) -> Tensor:
            with torch.no_grad():
                theirs = spectral_norms(teacher, iterations=iterations, gradient=gradient)
            ours = spectral_norms(leaves, iterations=iterations, gradient=gradient)
            return london_loss(ours, theirs).mean()

        return loss

    def london_published(*leaves: Tensor) -> Tensor:
        return published_london(leaves, teacher, 10)

    return [
        *(
            case(
                f"CAT, 2x2, {'normalised' if normalise else 'plain'}",
                [maps],
                lambda s, n=normalise: cat_loss(s, teacher_maps, normalise=n).mean(),
                lambda s, n=normalise: published_cat(s, teacher_maps, 2, n),
            )
            for normalise in (False, True)
        ),
        case(
            "LONDON, teacher's norms sent",
            student,
            lambda *s: london_loss(spectral_norms(s), sent).mean(),
            london_published,
        ),
        case("LONDON, both sides", student, london("exact", 20), london_published),
        case("LONDON, unrolled, 10 steps", student, london("unrolled", 10), london_published),
        case(
            "OFD",
            [wide],
            lambda s: ofd_loss(s, hint, margin).sum(),
            lambda s: published_ofd(s, hint, margin[None, :, None, None]),
        ),
        case(
            "FitNet",
            [thin],
            lambda s: fitnet_loss(regress(s), hint).mean(),
            lambda s: F.mse_loss(regress(s), hint),
        ),
    ]
