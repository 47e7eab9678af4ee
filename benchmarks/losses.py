"""CPU time and memory of the losses against literal transcriptions of the published formulas.

Run `python benchmarks/losses.py`; `--large` adds B=256, C=1000, where the edges of the class graph
written out take 14 GB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fedkd.losses.dkd import dkd_loss
from fedkd.losses.kd import standardised
from fedkd.relations import class_relation_loss, sample_relation_loss

Run = Callable[[], object]


def masked_dkd(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """DKD as published: one-hot masks, summed probabilities, -1000 on the target."""
    mask = torch.zeros_like(student).scatter_(1, targets[:, None], 1).bool()
    others = ~mask
    s, t = F.softmax(student / 4, dim=1), F.softmax(teacher / 4, dim=1)
    s2 = torch.stack([(s * mask).sum(1), (s * others).sum(1)], dim=1)
    t2 = torch.stack([(t * mask).sum(1), (t * others).sum(1)], dim=1)
    tckd = F.kl_div(s2.log(), t2, reduction="sum") * 16 / len(student)
    rest_t = F.softmax(teacher / 4 - 1000.0 * mask, dim=1)
    rest_s = F.log_softmax(student / 4 - 1000.0 * mask, dim=1)
    return tckd + 8 * F.kl_div(rest_s, rest_t, reduction="sum") * 16 / len(student)


def written_out(a: Tensor, b: Tensor, d: Tensor, e: Tensor, diagonal: bool) -> Tensor:
    """Mean Huber distance of unit edges, each edge written out."""
    student, teacher = a[:, None] - b, d[:, None] - e
    student = student / student.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    teacher = teacher / teacher.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    edges = len(a) * len(b) - (0 if diagonal else len(a))
    return F.huber_loss(student, teacher, reduction="sum") / edges


def measure(run: Run, seconds: float) -> tuple[float, float]:
    """Median CPU time of one run in ms, and the most memory live at once in MiB."""
    run()
    times: list[float] = []
    begin = time.process_time()
    while len(times) < 3 or time.process_time() - begin < seconds:
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times), peak(run)


def peak(run: Run) -> float:
    """Largest sum of live allocations during one run, MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = most = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        live += event.nbytes()
        most = max(most, live)
    return most / 2**20


def cases(size: int, classes: int) -> list[tuple[str, Run, Run]]:
    """Name, ours and the literal one; each draws forward and backward."""
    a, b, d, e = torch.randn(4, size, classes, generator=torch.Generator().manual_seed(0)).unbind()
    b, e = a + 0.5 * b, d + 0.5 * e
    targets = torch.arange(size) % classes
    views = [standardised(z) for z in (a, b, d, e)]
    teacher = torch.cat(views[2:])

    def step(loss: Callable[..., Tensor], *students: Tensor) -> Run:
        def run() -> None:
            leaves = [z.clone().requires_grad_() for z in students]
            loss(*leaves).backward()

        return run

    def literal_classes(x: Tensor) -> Tensor:
        return written_out(x.T, x.T, teacher.T, teacher.T, diagonal=False)

    return [
        (
            "DKD",
            step(lambda x: dkd_loss(x, d, targets, alpha=1, beta=8, temperature=4).mean(), a),
            step(lambda x: masked_dkd(x, d, targets), a),
        ),
        (
            "VRM samples",
            step(lambda x, y: sample_relation_loss(x, y, *views[2:]), *views[:2]),
            step(lambda x, y: written_out(x, y, *views[2:], diagonal=True), *views[:2]),
        ),
        (
            "VRM samples, Huber",
            step(lambda x, y: sample_relation_loss(x, y, *views[2:], distance="huber"), *views[:2]),
            step(lambda x, y: written_out(x, y, *views[2:], diagonal=True), *views[:2]),
        ),
        (
            "VRM classes",
            step(lambda x: class_relation_loss(x, teacher), torch.cat(views[:2])),
            step(literal_classes, torch.cat(views[:2])),
        ),
    ]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also B=256, C=1000 (needs 18 GB)")
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time per measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="forward + backward, float32, one thread (median CPU time, peak memory)")
    for column in ("loss", "B", "C", "ms", "literal ms", "times faster", "MiB", "literal MiB"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for size, classes in [(64, 100), *([(256, 1000)] if arguments.large else [])]:
        for name, ours, literal in cases(size, classes):
            ms, mib = measure(ours, arguments.seconds)
            literal_ms, literal_mib = measure(literal, arguments.seconds)
            table.add_row(
                name,
                str(size),
                str(classes),
                f"{ms:.3g}",
                f"{literal_ms:.3g}",
                f"{literal_ms / ms:.3g}",
                f"{mib:.3g}",
                f"{literal_mib:.3g}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
