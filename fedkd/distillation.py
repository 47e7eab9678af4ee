"""The student's training loop, the only one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkd.config import Optimizer
from fedkd.knowledge.kinds import Reading
from fedkd.knowledge.payload import Fused
from fedkd.models.network import Network
from fedkd.objective import Objective
from fedkd.optimization import make_optimizer, steps_per_epoch
from fedkd.randomness import seeded, stream


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave: epoch from 1, mean total loss, mean of each term."""

    epoch: int
    loss: float
    terms: dict[str, float]


def distill(
    student: Network,
    images: Tensor,
    fused: Fused,
    objective: Objective,
    *,
    views: Callable[[int], Tensor] | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    optimizer: Optimizer | None = None,
    optimizer_state: dict[str, Any] | None = None,
    seed: int = 0,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> tuple[list[EpochRecord], dict[str, Any]]:
    """Train `student` (in place, on the device it is on) to match fused teachers.

    Args:
        student: Network to train.
        images: Transfer images in their order, uint8 (N, channels, h, w).
        fused: What the teachers say about them.
        objective: Losses and weights; its trainable parts are trained along.
        views: View number -> the transfer images under that virtual view.
        epochs: Passes over the transfer set.
        batch_size: Samples per step; a last batch of one sample is dropped (batch norm).
        optimizer: Optimiser and schedule over these epochs.
        optimizer_state: State of an earlier call to go on from; its schedule is not kept.
        seed: Seed of the order of samples and of dropout.
        on_epoch: Called after every epoch.

    Returns:
        One record per epoch, and the optimiser's state.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    options = optimizer or Optimizer()
    device = student.mean.device
    objective.to(device)
    total = len(images)
    steps = max(1, steps_per_epoch(total, batch_size)) * epochs
    parameters = [p for p in (*student.parameters(), *objective.parameters()) if p.requires_grad]
    optim, schedule = make_optimizer(parameters, options, steps)
    if optimizer_state is not None:
        _resume_moments(optim, optimizer_state)
    targets = fused.targets.to(device)
    order = stream(seed, "order")
    history = []
    student.train()
    with seeded(seed, "student"):
        for epoch in range(1, epochs + 1):
            sums: dict[str, float] = {}
            seen = 0
            permutation = torch.randperm(total, generator=order)
            for index in permutation.split(batch_size):
                if len(index) == 1 and total > 1:
                    continue
                reading = _reading(student, images, views, index, device)
                readings = {kind: kind.read(reading) for kind in objective.reads}
                ensemble = fused.bank.rows(index, device)
                loss, terms = objective(readings, ensemble, targets[index], epoch)
                if not torch.isfinite(loss):
                    raise RuntimeError(
                        f"the student's loss is {loss.item()} in epoch {epoch} "
                        f"({', '.join(f'{k} {v.item():.4g}' for k, v in terms.items())}); "
                        "lower the learning rate or a loss's weight"
                    )
                optim.zero_grad(set_to_none=True)
                loss.backward()
                if options.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
                optim.step()
                schedule.step()
                seen += len(index)
                for name, value in {"loss": loss.detach(), **terms}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(index)
            means = {name: value / max(seen, 1) for name, value in sums.items()}
            record = EpochRecord(epoch, means.pop("loss"), means)
            history.append(record)
            if on_epoch is not None:
                on_epoch(record)
    student.eval()
    return history, optim.state_dict()


def _reading(
    student: Network,
    images: Tensor,
    views: Callable[[int], Tensor] | None,
    index: Tensor,
    device: torch.device,
) -> Reading:
    virtual = None if views is None else lambda number: views(number)[index].to(device)
    return Reading(student, images[index].to(device), virtual)


def _resume_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over momentum and moments, but keep this call's learning rate and schedule."""
    groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
