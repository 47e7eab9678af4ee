"""Losses on relations between samples or classes, ours and as published."""

from __future__ import annotations

from collections.abc import Callable

import torch
from output_cases import z_scores
from torch import Tensor
from torch.nn import functional as F

from fedkd.losses.vrm import vrm_loss
from fedkd.relations import class_relation_loss, sample_relation_loss

Run = Callable[[], object]


def relation_cases(size: int, classes: int) -> list[tuple[str, Run, Run]]:
    """VRM, whole and in parts."""
    a, b, d, e = torch.randn(4, size, classes, generator=torch.Generator().manual_seed(0)).unbind()
    b, e = a + 0.5 * b, d + 0.5 * e
    views = [z_scores(z) for z in (a, b, d, e)]
    teacher = torch.cat(views[2:])

    def step(loss: Callable[..., Tensor], *students: Tensor) -> Run:
        return lambda: loss(*(z.clone().requires_grad_() for z in students)).backward()

    return [
        (
            "VRM",
            step(lambda x, y: vrm_loss(x, y, d, e, class_weight=1.0), a, b),
            step(lambda x, y: published_vrm(x, y, d, e), a, b),
        ),
        (
            "VRM, Huber",
            step(lambda x, y: vrm_loss(x, y, d, e, class_weight=1.0, distance="huber"), a, b),
            step(lambda x, y: published_vrm(x, y, d, e), a, b),
        ),
        (
            "VRM, samples alone",
            step(lambda x, y: sample_relation_loss(x, y, *views[2:]), *views[:2]),
            step(lambda x, y: written_out(x, y, *views[2:], diagonal=True), *views[:2]),
        ),
        (
            "VRM, classes alone",
            step(lambda x: class_relation_loss(x, teacher), torch.cat(views[:2])),
            step(lambda x: written_out_classes(x, teacher), torch.cat(views[:2])),
        ),
    ]


def published_vrm(a: Tensor, b: Tensor, d: Tensor, e: Tensor) -> Tensor:
    """Both graphs of VRM as the paper's formulas say, each edge written out."""
    a, b, d, e = (z_scores(z) for z in (a, b, d, e))
    classes = written_out_classes(torch.cat([a, b]), torch.cat([d, e]))
    return written_out(a, b, d, e, diagonal=True) + classes


def written_out_classes(student: Tensor, teacher: Tensor) -> Tensor:
    """The class graph as published."""
    return written_out(student.T, student.T, teacher.T, teacher.T, diagonal=False)


def written_out(a: Tensor, b: Tensor, d: Tensor, e: Tensor, diagonal: bool) -> Tensor:
    """Mean Huber distance of unit edges, each edge written out."""
    student, teacher = a[:, None] - b, d[:, None] - e
    student = student / student.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    teacher = teacher / teacher.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    edges = len(a) * len(b) - (0 if diagonal else len(a))
    return F.huber_loss(student, teacher, reduction="sum") / edges
