"""CPU time of a step of DP-SGD, with hooks and with ghost clipping, against a plain step.

Run `python benchmarks/dp_sgd.py`; the three take turns, so that a noisy neighbour hits all of them.
The times are this machine's, the ratios are what to read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedkd.models import MODELS
from fedkd.privacy.clipping import ClippedSteps, Clipping
from fedkd.privacy.model_check import example_cross_entropy

CASES: dict[str, tuple[str, dict[str, object], int, int]] = {
    "cnn_small, 28x28": ("cnn_small", {"norm": "group"}, 1, 28),
    "mlp of 512, 32x32": ("mlp", {"hidden": 512}, 3, 32),
}
Step = Callable[[], None]


def make_steps(case: str, batch: int) -> dict[str, Step]:
    """One step of each way, on a network of its own."""
    name, options, channels, side = CASES[case]
    images = torch.randn(batch, channels, side, side)
    labels = torch.randint(10, (batch,))

    def network() -> nn.Module:
        torch.manual_seed(0)
        return MODELS.create(name, 10, channels, side, **options)

    return {
        "plain": _plain(network().train(), images, labels),
        "hooks": _private(network(), images, labels, "hooks"),
        "ghost": _private(network(), images, labels, "ghost"),
    }


def _plain(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        example_cross_entropy(network(images), labels).mean().backward()
        optimizer.step()

    return step


def _private(network: nn.Module, images: Tensor, labels: Tensor, clipping: Clipping) -> Step:
    steps = ClippedSteps(
        network,
        example_cross_entropy,
        torch.optim.SGD(network.parameters(), lr=1e-4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=float(len(images)),
        clipping=clipping,
        generator=torch.Generator().manual_seed(0),
    )
    return lambda: steps.step([(images, labels)])


def measure(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Median CPU time in ms of each, in turns; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.process_time()
    turn = 0
    while turn < 4 or time.process_time() - begin < seconds:
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn:
                times[name].append(1e3 * (time.process_time() - start))
        turn += 1
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU time per network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"one step of {arguments.batch} images, one thread")
    for name in ("network", "plain, ms", "hooks", "ghost"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for case in CASES:
        taken = measure(make_steps(case, arguments.batch), arguments.seconds)
        ratios = (f"{taken[name] / taken['plain']:.1f}x" for name in ("hooks", "ghost"))
        table.add_row(case, f"{taken['plain']:.1f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
