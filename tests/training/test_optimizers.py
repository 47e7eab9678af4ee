"""Optimisers as accelerators have them are those of a CPU."""

import pytest
import torch

from fedkd.training.optimizers import Optimizer, make_optimizer


@pytest.mark.parametrize(
    "options",
    [
        Optimizer(name="sgd", lr=0.1, momentum=0.9, nesterov=True, schedule="cosine"),
        Optimizer(name="sgd", lr=0.1, momentum=0.0),
        Optimizer(name="adamw", lr=0.1, warmup=0.5),
    ],
    ids=["momentum", "plain", "adamw"],
)
def test_a_weight_whose_gradient_begins_later_is_moved_as_on_a_cpu(options: Optimizer) -> None:
    ends = []
    for on_device in (False, True):
        first, later = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        optimizer, schedule = make_optimizer([first, later], options, 4, on_device=on_device)
        for step in range(4):
            optimizer.zero_grad(set_to_none=True)
            loss = (first**2).sum() if step < 2 else ((first - later) ** 2).sum()
            loss.backward()
            optimizer.step()
            schedule.step()
        ends.append(torch.cat([first, later]).detach())
    torch.testing.assert_close(ends[1], ends[0])
