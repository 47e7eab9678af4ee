"""Cells of a study beside each other: Ray tasks, each with a GPU of its own where there are any.

A task makes the study anew from its config and runs one cell as `fedkd.studies.engine` does. So
its result is that of a cell run alone: on a CPU, bit for bit. A task whose process dies is begun
again once; a cell's checkpoints are where it left them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedkd.config import ConfigError, import_plugins
from fedkd.rounds import Notify
from fedkd.simulations.ray import OFFLINE, running_ray
from fedkd.studies.config import StudyConfig
from fedkd.studies.engine import Cell, Record, Study, run_one

# Events of a cell that are shown when it ends; the others are about what goes on now.
_SHOWN = ("trained", "warning", "refused")
_POLL_SECONDS = 0.2

Event = tuple[str, Record]
AnyStudy = Study[Any, Any]

_known: dict[tuple[str, int], AnyStudy] = {}


@contextmanager
def beside(study: AnyStudy, folder: Path, count: int, notify: Notify) -> Iterator[_Tasks]:
    """Jobs for `run_study`, `count` at once.

    Raises:
        ConfigError: Ray has fewer processors, or the config names one GPU for all.
        RuntimeError: Ray cannot be started.
    """
    resources = study.config.experiment.resources
    if ":" in resources.device:
        kind = resources.device.partition(":")[0]
        raise ConfigError(
            f"experiment.resources.device: with --jobs each cell sees the GPU that it is given, so "
            f"{resources.device!r} names none; write {kind}"
        )
    os.environ.update(OFFLINE)
    with running_ray(resources.ray_address, notify):
        import ray

        room = ray.cluster_resources()
        if count > room.get("CPU", 0):
            raise ConfigError(
                f"--jobs: {count} at once asked for, but Ray sees {room.get('CPU', 0):g} CPU here; "
                f"give --jobs {max(int(room.get('CPU', 1)), 1)} or less"
            )
        gpus = 0.0 if resources.device == "cpu" else room.get("GPU", 0.0)
        tasks = _Tasks(study, folder, count, min(1.0, gpus / count))
        try:
            yield tasks
        finally:
            tasks.cancel()


class _Tasks:
    """Tasks under way, and cells that wait for one of them to end."""

    def __init__(self, study: AnyStudy, folder: Path, count: int, gpus: float) -> None:
        import ray

        self._study, self._folder, self._count = study, folder, count
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)
        self._run = task(_cell)
        self._waiting: deque[Cell[Any]] = deque()
        self._running: dict[Any, Cell[Any]] = {}

    def start(self, cell: Cell[Any]) -> None:
        """As `Jobs`."""
        self._waiting.append(cell)
        self._fill()

    def finished(self, notify: Notify) -> Iterator[tuple[Cell[Any], Record]]:
        """As `Jobs`."""
        import ray

        while self._running:
            notify("waiting")  # raises after Ctrl-C
            ready, _ = ray.wait(list(self._running), timeout=_POLL_SECONDS)
            for task in ready:
                cell = self._running.pop(task)
                self._fill()
                try:
                    events, facts = ray.get(task)
                except ray.exceptions.RayError as error:
                    events, facts = [], _failed(error)
                for event, shown in events:
                    notify(event, **shown)
                yield cell, facts

    def cancel(self) -> None:
        """End what is under way; nobody waits for it any more."""
        import ray

        for task in self._running:
            ray.cancel(task, force=True)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._count:
            cell = self._waiting.popleft()
            task = self._run.remote(
                type(self._study),
                self._study.config,
                str(self._folder),
                cell.path,
                cell.seed,
                str(Path.cwd()),
            )
            self._running[task] = cell


def _failed(error: Exception) -> Record:
    """What is written of a cell whose process ended, or raised before the cell began."""
    cause = getattr(error, "cause", None)
    if cause is None:
        reason = str(error).strip().splitlines()[0]
        return {"error": f"its process ended: {reason}", "traceback": ""}
    first = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return {"error": first, "traceback": str(error)}


def _cell(
    kind: type[AnyStudy], config: StudyConfig, folder: str, path: str, seed: int, cwd: str
) -> tuple[list[Event], Record]:
    """Run one cell in a process of Ray's."""
    if Path(cwd).is_dir():  # relative paths of data start there
        os.chdir(cwd)
    import_plugins(config.plugins)
    study = _known.get((folder, seed))
    if study is None or study.config != config:
        _known.clear()
        study = _known[folder, seed] = kind(config)
        study.begin(Path(folder), seed, lambda *_, **__: None)  # is there already, so this reads
    events: list[Event] = []

    def keep(event: str, **facts: Any) -> None:
        if event in _SHOWN:
            events.append((event, facts))

    (cell,) = [cell for cell in study.cells if cell.path == path]
    return events, run_one(study, Path(folder), cell, keep)
