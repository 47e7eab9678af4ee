"""Config -> optimiser and learning-rate schedule, for teachers and students alike."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fedkd.config import Optimizer


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: Optimizer, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Optimiser over `parameters` and a schedule that is stepped once per batch."""
    optimizer: torch.optim.Optimizer
    if options.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        )
    else:
        kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
        optimizer = kind(parameters, lr=options.lr, weight_decay=options.weight_decay)
    return optimizer, LambdaLR(optimizer, lambda step: _factor(options, step, total_steps))


def _factor(options: Optimizer, step: int, total: int) -> float:
    """Learning rate at `step` (from 0) as a share of `options.lr`."""
    progress = min(step / max(total, 1), 1.0)
    if progress < options.warmup:
        return (step + 1) / (options.warmup * total + 1)
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if options.schedule == "step":
        return options.gamma ** bisect.bisect_right(options.milestones, progress)
    return 1.0
