"""Losses on the logits of single samples, ours and as published."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.losses.dkd import dkd_loss
from fedkd.losses.kd import kd_loss

Run = Callable[[], object]


def output_cases(size: int, classes: int) -> list[tuple[str, Run, Run]]:
    """KD, with and without standardised logits, and DKD."""
    student, teacher = torch.randn(
        2, size, classes, generator=torch.Generator().manual_seed(0)
    ).unbind()
    targets = torch.arange(size) % classes

    def step(loss: Callable[[Tensor], Tensor]) -> Run:
        return lambda: loss(student.clone().requires_grad_()).backward()

    return [
        (
            "KD",
            step(lambda x: kd_loss(x, teacher, temperature=4).mean()),
            step(lambda x: divergence(x, teacher)),
        ),
        (
            "KD, standardised",
            step(lambda x: kd_loss(x, teacher, temperature=2, standardise=True).mean()),
            step(lambda x: divergence(z_scores(x), z_scores(teacher), 2)),
        ),
        (
            "DKD",
            step(lambda x: dkd_loss(x, teacher, targets, beta=8).mean()),
            step(lambda x: masked_dkd(x, teacher, targets)),
        ),
        (
            "DKD, standardised",
            step(lambda x: dkd_loss(x, teacher, targets, beta=8, standardise=True).mean()),
            step(lambda x: masked_dkd(z_scores(x), z_scores(teacher), targets)),
        ),
    ]


def divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """KD as published: elementwise KL, summed over classes, mean over the batch."""
    p = F.softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


def z_scores(logits: Tensor) -> Tensor:
    """Standardised logits as published."""
    mean, std = logits.mean(dim=-1, keepdim=True), logits.std(dim=-1, keepdim=True)
    return (logits - mean) / (1e-7 + std)


def masked_dkd(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """DKD as published: one-hot masks, summed probabilities, -1000 on the target."""
    mask = torch.zeros_like(student).scatter_(1, targets[:, None], 1).bool()
    others = torch.ones_like(student).scatter_(1, targets[:, None], 0).bool()
    s, t = F.softmax(student / 4, dim=1), F.softmax(teacher / 4, dim=1)
    s2 = torch.cat([(s * mask).sum(1, keepdim=True), (s * others).sum(1, keepdim=True)], dim=1)
    t2 = torch.cat([(t * mask).sum(1, keepdim=True), (t * others).sum(1, keepdim=True)], dim=1)
    tckd = F.kl_div(s2.log(), t2, reduction="sum") * 16 / len(student)
    rest_t = F.softmax(teacher / 4 - 1000.0 * mask, dim=1)
    rest_s = F.log_softmax(student / 4 - 1000.0 * mask, dim=1)
    return tckd + 8 * F.kl_div(rest_s, rest_t, reduction="sum") * 16 / len(student)
