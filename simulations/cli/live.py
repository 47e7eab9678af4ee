"""Progress a person can watch: a bar for the rounds, a bar for the phase, a row per round."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedkd.config import Experiment
from fedkd.rounds import Interrupted
from simulations.cli.screen import screen

_PHASES = {
    "describe": "meeting the clients",
    "train": "teachers train",
    "knowledge": "teachers answer",
    "distil": "student learns",
    "evaluate": "evaluation",
    "oracle": "baseline: oracle",
    "ceiling": "baseline: ceiling",
    "report": "writing the report",
}


class StopOnRequest:
    """While it is entered, Ctrl-C is remembered, and `check` raises `Interrupted`.

    So a run ends in good order, where it can be gone on with. A second Ctrl-C ends the process at
    once.

    Args:
        heard: Called at the first Ctrl-C.
    """

    def __init__(self, heard: Callable[[], None] = lambda: None) -> None:
        self._asked = threading.Event()
        self._heard = heard

    def __enter__(self) -> StopOnRequest:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        if self._asked.is_set():
            os._exit(130)
        self._asked.set()
        self._heard()

    @property
    def asked(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._asked.is_set()

    def check(self) -> None:
        """Raise `Interrupted` if Ctrl-C was pressed."""
        if self.asked:
            raise Interrupted


class LiveView:
    """A `Notify` that shows progress on a console; plain lines where it is not a terminal.

    While it is shown, Ctrl-C ends the run in good order: the next event raises `Interrupted`
    in the server's thread, so that Flower and Ray shut down as after an error.
    """

    def __init__(self, experiment: Experiment, console: Console) -> None:
        self._experiment = experiment
        self._stop = StopOnRequest()
        self._console = console
        self._table = rounds_table()
        self._progress = Progress(
            TextColumn("{task.description:>22}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._rounds = self._progress.add_task("rounds", total=experiment.rounds)
        self._phase = self._progress.add_task("starting", total=None)
        self._live = Live(Group(self._table, self._progress), console=console, refresh_per_second=4)

    def __enter__(self) -> LiveView:
        self._stop.__enter__()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.__exit__()
        if self._console.is_terminal:
            self._progress.remove_task(self._phase)
            self._live.stop()

    def __call__(self, event: str, **facts: Any) -> None:
        """One event; called from the server's thread. Raises `Interrupted` after Ctrl-C."""
        self._stop.check()
        if event == "round_start":
            self._progress.update(self._rounds, completed=facts["round"] - 1)
        elif event == "phase":
            total = facts.get("total")
            if facts["phase"] == "distil":
                total = self._experiment.distillation.epochs
            self._progress.reset(
                self._phase, total=total, description=_PHASES.get(facts["phase"], facts["phase"])
            )
        elif event in ("reply", "epoch"):
            self._progress.advance(self._phase)
        elif event == "refused":
            who = "a node" if facts["client"] is None else f"client {facts['client']}"
            self._console.print(
                f"[yellow]round {facts['round']}, {facts['phase']}: {who} left out:[/] "
                f"{escape(facts['reason'])}",
                highlight=False,
            )
        elif event == "warning":
            self._console.print(f"[yellow]note:[/] {escape(facts['text'])}", highlight=False)
        elif event == "round":
            self._progress.update(self._rounds, completed=facts["round"])
            row = round_row(facts)
            self._table.add_row(*row)
            if not self._console.is_terminal:
                titles = [str(column.header) for column in self._table.columns]
                line = ", ".join(f"{t} {v}" for t, v in zip(titles, row, strict=True))
                self._console.print(line, highlight=False, soft_wrap=True)


def rounds_table() -> Table:
    """An empty table of rounds."""
    table = Table(box=None, padding=(0, 2))
    for title in ("round", "student", "ensemble", "best teacher", "pseudo-labels", "answered"):
        table.add_column(title, justify="right")
    return table


def round_row(facts: dict[str, Any]) -> list[str]:
    """One row of `rounds_table` from a round's facts."""
    teachers = facts.get("teachers") or {}
    silent = sum(share == 0 for share in (facts.get("weights") or {}).values())
    note = "" if facts["status"] == "ok" else " degraded"
    return [
        f"{facts['round']}{note}",
        percent(facts["student"]["accuracy"]),
        percent((facts.get("ensemble") or {}).get("accuracy")),
        percent(max(teachers.values(), default=None)),
        percent(facts.get("pseudo_labels")),
        str(len(facts["answered"])) + (f", {silent} without a say" if silent else ""),
    ]


def percent(value: float | None) -> str:
    """`87.1 %`, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


@contextmanager
def quiet_descriptors(log: Path) -> Iterator[Console]:
    """Send everything written to stdout and stderr, by this process and its children, to `log`.

    Ray's daemons and C++ code write to the descriptors, where no logging setting reaches them.

    Yields:
        A console on the real stdout.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with (
        os.fdopen(
            os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace", buffering=1
        ) as out,
        log.open("a", encoding="utf-8") as sink,
    ):
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield screen(file=out)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, target)
                os.close(saved)
