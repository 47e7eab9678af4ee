"""CPU time and memory of the losses against literal transcriptions of the published code.

Run `python benchmarks/losses.py`; `--large` adds B=256, C=1000, where the edges of the class graph
written out take 14 GB. `--only VRM` measures what begins so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from feature_cases import feature_cases
from output_cases import output_cases
from relation_cases import relation_cases
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from wkd_cases import wkd_cases

Run = Callable[[], object]
# Name, ours and the literal one; each draws forward and backward.
Case = tuple[str, Run, Run]


def cases(size: int, classes: int) -> list[Case]:
    """All of them; those on maps of fixed size come with the small batch alone."""
    found = [*output_cases(size, classes), *relation_cases(size, classes)]
    if size <= 64:
        found += [*wkd_cases(size, classes), *feature_cases(size)]
    return found


def measure(ours: Run, literal: Run, seconds: float) -> tuple[list[float], list[float]]:
    """CPU times in ms of single runs, a few of one and a few of the other in turns.

    So a noisy neighbour hits both. The first run of each turn finds the caches full of the
    other's tensors and is not counted.
    """
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.process_time()
    while len(times[0]) < 3 or time.process_time() - begin < 2 * seconds:
        for run, taken in zip((ours, literal), times, strict=True):
            run()
            turn = start = time.process_time()
            while start - turn < 0.02:
                run()
                end = time.process_time()
                taken.append(1e3 * (end - start))
                start = end
    return times


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


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also B=256, C=1000 (needs 18 GB)")
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time per measurement")
    parser.add_argument("--only", default="", help="beginning of the names to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="forward + backward, float32, one thread: CPU time and peak memory")
    columns = ("loss", "B", "C", "ms", "literal ms", "times faster", "fastest", "MiB", "literal")
    for column in columns:
        table.add_column(column, justify="left" if column == "loss" else "right")
    for size, classes in [(64, 100), *([(256, 1000)] if arguments.large else [])]:
        for name, ours, literal in cases(size, classes):
            if not name.startswith(arguments.only):
                continue
            ms, literal_ms = measure(ours, literal, arguments.seconds)
            median, literal_median = statistics.median(ms), statistics.median(literal_ms)
            table.add_row(
                name,
                str(size),
                str(classes),
                f"{median:.3g}",
                f"{literal_median:.3g}",
                f"{literal_median / median:.3g}",
                f"{min(literal_ms) / min(ms):.3g}",
                f"{peak(ours):.3g}",
                f"{peak(literal):.3g}",
            )
    Console(width=110).print(table)
    print("Times are medians of runs taken in turns; `fastest` compares the fastest run of each.")


if __name__ == "__main__":
    main()
