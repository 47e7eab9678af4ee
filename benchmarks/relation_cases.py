"""Losses on relations between samples or classes, ours and as published."""

from __future__ import annotations

from collections.abc import Callable

import torch
from output_cases import z_scores
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.relations import class_graph, match, sample_graph
from fedkd.losses.dist import dist_loss
from fedkd.losses.rkd import rkd_loss
from fedkd.losses.sp import sp_loss
from fedkd.losses.vrm import vrm_loss

Run = Callable[[], object]


def relation_cases(size: int, classes: int) -> list[tuple[str, Run, Run]]:
    """DIST, SP, RKD in its two parts, VRM whole and in its two parts."""
    a, b, d, e = torch.randn(4, size, classes, generator=torch.Generator().manual_seed(0)).unbind()
    b, e = a + 0.5 * b, d + 0.5 * e
    views = [z_scores(z) for z in (a, b, d, e)]
    teacher = torch.cat(views[2:])

    def step(loss: Callable[..., Tensor], *students: Tensor) -> Run:
        return lambda: loss(*(z.clone().requires_grad_() for z in students)).backward()

    cases = [
        (
            "DIST",
            step(lambda x: dist_loss(x, d), a),
            step(lambda x: published_dist(x, d), a),
        ),
        (
            "SP",
            step(lambda x: sp_loss(x, d), a),
            step(lambda x: published_sp(x, d), a),
        ),
        (
            "RKD, distances",
            step(lambda x: rkd_loss(x, d, angle_weight=0), a),
            step(lambda x: 25 * published_distances(x, d), a),
        ),
        (
            "RKD, angles",
            step(lambda x: rkd_loss(x, d, distance_weight=0), a),
            step(lambda x: 50 * published_angles(x, d), a),
        ),
        (
            "VRM",
            step(lambda x, y: vrm_loss(x, y, d, e, class_weight=1.0), a, b),
            step(lambda x, y: published_vrm(x, y, d, e), a, b),
        ),
        (
            "VRM, samples alone",
            step(lambda x, y: match(torch.cat([x, y]), teacher, sample_graph()), *views[:2]),
            step(lambda x, y: written_out(x, y, *views[2:], diagonal=True), *views[:2]),
        ),
        (
            "VRM, classes alone",
            step(lambda x: match(x, teacher, class_graph()), torch.cat(views[:2])),
            step(lambda x: written_out_classes(x, teacher), torch.cat(views[:2])),
        ),
    ]
    if size <= 64:  # the larger literal one takes minutes
        cases.append(
            (
                "VRM, Huber",
                step(lambda x, y: vrm_loss(x, y, d, e, class_weight=1.0, distance="huber"), a, b),
                step(lambda x, y: published_vrm(x, y, d, e), a, b),
            )
        )
    return cases


def published_vrm(a: Tensor, b: Tensor, d: Tensor, e: Tensor) -> Tensor:
    """Both graphs of VRM by the paper's formulas, each edge written out."""
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


def published_dist(student: Tensor, teacher: Tensor) -> Tensor:
    """DIST as published: eps is added to the product of the norms."""

    def relation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p, q = (student / 4).softmax(1), (teacher / 4).softmax(1)
    return 16 * relation(p, q) + 16 * relation(p.T, q.T)


def published_sp(student: Tensor, teacher: Tensor) -> Tensor:
    """SP as published."""
    gap = F.normalize(teacher @ teacher.T) - F.normalize(student @ student.T)
    return (gap * gap).sum() / len(student) ** 2


def published_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD's distances as published."""

    def scaled(x: Tensor) -> Tensor:
        square = x.pow(2).sum(dim=1)
        lengths = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt().clone()
        lengths[range(len(x)), range(len(x))] = 0
        return lengths / lengths[lengths > 0].mean()

    return F.smooth_l1_loss(scaled(student), scaled(teacher))


def published_angles(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD's angles as published: edges written out, then all their products."""

    def angles(x: Tensor) -> Tensor:
        edges = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(edges, edges.mT).flatten()

    with torch.no_grad():
        expected = angles(teacher)
    return F.smooth_l1_loss(angles(student), expected)
