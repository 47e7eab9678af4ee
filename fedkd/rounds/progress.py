"""Who receives progress, how many threads compute, and what each phase took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from fedkd.io.meters import Meter
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
    """What each named phase took.

    Args:
        gpus: Whether GPUs work too, whose energy then counts.

    Attributes:
        seconds: Phase -> duration.
        joules: Phase -> energy, where this machine counts it.
        memory: Phase -> bytes of the largest process, at its peak.
        gpu_memory: Phase -> bytes on the server's GPU, if it has one.
    """

    def __init__(self, *, gpus: bool = False) -> None:
        self._gpus = gpus
        self.seconds: dict[str, float] = {}
        self.joules: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.gpu_memory: dict[str, int] = {}

    @contextmanager
    def measure(self, name: str, *, workers: bool = False) -> Iterator[None]:
        """Add what a block takes to phase `name`; `workers`: Ray's workers do the work."""
        meter = Meter(gpus=self._gpus, workers=workers)
        meter.start()
        try:
            yield
        finally:
            meter.stop()
            self.seconds[name] = self.seconds.get(name, 0.0) + meter.seconds
            if meter.joules is not None:
                self.joules[name] = self.joules.get(name, 0.0) + meter.joules
            for kept, peak in ((self.memory, meter.memory), (self.gpu_memory, meter.gpu_memory)):
                if peak is not None:
                    kept[name] = max(kept.get(name, 0), peak)
