"""Progress of work on a finished run: one line of what is under way, and a bar."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from simulations.cli.live import StopOnRequest

# Event -> (what it counts, key of how many are done, key of all).
_COUNTS = {
    "permutation": ("orders", "done", "total"),
    "client": ("clients", "done", "clients"),
    "round_start": ("rounds", "round", "rounds"),
    "cell": ("cells", "done", "total"),
    "teacher": ("teachers", "done", "total"),
}


class StepView:
    """A `Notify` with a bar per thing that is counted. Raises `Interrupted` after Ctrl-C."""

    def __init__(self, console: Console, title: str) -> None:
        self._stop = StopOnRequest()
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._console = console
        self._title = title
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> StepView:
        self._stop.__enter__()
        self._console.print(self._title, highlight=False, soft_wrap=True, markup=False)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._stop.__exit__()

    def __call__(self, event: str, **facts: Any) -> None:
        """One event."""
        if event in _COUNTS:
            name, done, total = _COUNTS[event]
            task = self._tasks.get(name)
            if task is None:
                task = self._tasks[name] = self._progress.add_task(name, note="")
            self._progress.update(
                task, completed=facts[done], total=facts[total], note=facts.get("note", "")
            )
        elif event == "warning":
            self._console.print(f"[yellow]note:[/] {escape(facts['text'])}", highlight=False)
        self._stop.check()
