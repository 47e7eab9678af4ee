"""Progress of a comparison: a bar for rows and seeds, a bar for the rounds of the one under way."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from simulations.cli.live import StopOnRequest, percent


class CompareView:
    """A `Notify` that shows progress; plain lines where it is not a terminal.

    While it is shown, Ctrl-C ends the work at the next event; fedkd's own runs go on from their
    last round, baselines start anew.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._stop = StopOnRequest()
        self._progress = Progress(
            TextColumn("{task.description:>28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._rows = self._progress.add_task("rows and seeds", total=None, note="")
        self._rounds = self._progress.add_task("splitting the images", total=None, note="")

    def __enter__(self) -> CompareView:
        self._stop.__enter__()
        self._console.print(self._title, highlight=False, soft_wrap=True, markup=False)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._stop.__exit__()

    def __call__(self, event: str, **facts: Any) -> None:
        """One event. Raises `Interrupted` after Ctrl-C."""
        if event == "cell":
            self._progress.update(self._rows, completed=facts["done"], total=facts["total"])
            self._progress.reset(self._rounds, total=None, description=facts["label"], note="")
        elif event == "round":
            note = f"accuracy {percent(facts['accuracy'])}"
            self._progress.update(
                self._rounds, completed=facts["round"], total=facts["rounds"], note=note
            )
        elif event == "cell_done":
            self._console.print(_line(facts), highlight=False, soft_wrap=True)
        elif event == "refused":
            client, reason = facts["client"], escape(facts["reason"])
            self._console.print(f"[yellow]client {client} left out:[/] {reason}", highlight=False)
        self._stop.check()


def _line(facts: dict[str, Any]) -> str:
    if "error" in facts:
        return f"[red]{facts['label']}: failed:[/] {escape(facts['error'])}"
    line = f"{facts['label']}: {percent(facts['final'])}"
    if facts["best"] > facts["final"]:
        line += f", best {percent(facts['best'])} in round {facts['best_round']}"
    return line + f" [dim]({facts['wall']:.0f} s)[/]"
