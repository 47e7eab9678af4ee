"""Optimisers as accelerators have them are those of a CPU."""

import pytest
import torch

from fedkd.training.optimizers import Optimizer, learning_rate, make_optimizer

OPTIONS = [
    Optimizer(name="sgd", lr=0.1),
    Optimizer(name="sgd", lr=0.1, nesterov=True, weight_decay=0.0, schedule="step"),
    Optimizer(name="sgd", lr=0.1, momentum=0.0),
    Optimizer(name="adam", lr=0.01, warmup=0.25),
    Optimizer(name="adam", lr=0.01, weight_decay=0.1),
    Optimizer(name="adamw", lr=0.01),
    Optimizer(name="adamw", lr=0.01, weight_decay=0.0, schedule="constant"),
]


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


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_a_step_on_a_cpu_has_the_bits_of_torch_weight_by_weight(options: Optimizer) -> None:
    """Of any size, with weights that get their first gradient later or none at all."""
    torch.manual_seed(0)
    shapes = [(3,), (17,), (5, 7), (16, 3, 3, 3), (1,), (9,), (4,)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizer, schedule = make_optimizer(ours, options, 40)
    lr, decay = options.rates
    literal: torch.optim.Optimizer
    if options.name == "sgd":
        literal = torch.optim.SGD(
            theirs,
            lr=lr,
            momentum=options.momentum,
            weight_decay=decay,
            nesterov=options.nesterov,
            foreach=False,
        )
    else:
        kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
        literal = kind(theirs, lr=lr, weight_decay=decay, foreach=False)
    for step in range(40):
        literal.param_groups[0]["lr"] = learning_rate(options, step, 40)
        for number, (own, other) in enumerate(zip(ours, theirs)):
            seen = number < 5 or (number == 5 and step > 10)
            own.grad = torch.randn(own.shape) * 10.0 ** (step % 7 - 3) if seen else None
            other.grad = None if own.grad is None else own.grad.clone()
        optimizer.step()
        literal.step()
        schedule.step()
        assert all(torch.equal(own, other) for own, other in zip(ours, theirs)), step
    for own, other in zip(ours, theirs):
        assert optimizer.state[own].keys() == literal.state[other].keys()
        for name, value in literal.state[other].items():
            assert value is None or torch.equal(optimizer.state[own][name], value), name
