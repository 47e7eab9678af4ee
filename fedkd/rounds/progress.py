"""Who receives progress, how many threads compute, and how long each phase took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from fedkd.training.graph import Graphs, default_graphs
from fedkd.training.numerics import deterministic


class Interrupted(Exception):
    """The user wants the work to stop: raised by a `Notify`, so that it ends in good order."""


class Notify(Protocol):
    """Receives progress as it happens: an event's name and its facts."""

    def __call__(self, event: str, **facts: Any) -> None:
        """One event."""


def silent(event: str, **facts: Any) -> None:
    """Drops every event."""


class Compute(Protocol):
    """Resources of a run or a study, as far as both have them."""

    @property
    def graphs(self) -> Graphs:
        """Whether steps are captured as graphs."""

    @property
    def deterministic(self) -> bool:
        """Whether a GPU computes the same bits each time."""


@contextmanager
def computing(resources: Compute, threads: int) -> Iterator[None]:
    """Run a block with the resources of a config.

    Args:
        resources: Of the run.
        threads: Of the CPU: floating-point sums depend on their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with default_graphs(resources.graphs), deterministic(resources.deterministic):
            yield
    finally:
        torch.set_num_threads(before)


class Stopwatch:
    """Seconds per named phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, name: str) -> _Lap:
        """Context manager that adds its duration to `name`."""
        return _Lap(self.seconds, name)


class _Lap:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent
