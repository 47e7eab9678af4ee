"""Progress of a study: a bar for the networks, a bar for the epochs of the one under way."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from simulations.cli.live import StopOnRequest, percent


class StudyView:
    """A `Notify` that shows a study's progress; plain lines where it is not a terminal.

    While it is shown, Ctrl-C ends the study after the epoch under way, whose state is kept.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stop = StopOnRequest(self._say_so)
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
        self._tested = ""
        self._networks = self._progress.add_task("networks", total=None, note="")
        self._epochs = self._progress.add_task("fitting losses", total=None, note="")

    def __enter__(self) -> StudyView:
        self._stop.__enter__()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.__exit__()
        self._progress.stop()

    def _say_so(self) -> None:
        self._progress.update(self._epochs, note="stops after this epoch (again: at once)")

    def __call__(self, event: str, **facts: Any) -> None:
        """One event. Raises `Interrupted` after Ctrl-C."""
        if event == "plan":
            self._progress.update(self._networks, total=facts["trainings"])
        elif event == "training":
            self._progress.reset(
                self._epochs, total=facts["epochs"], description=facts["label"], note=""
            )
            self._tested = ""
        elif event == "epoch":
            note = f"loss {facts['loss']:.4g}"
            if facts["accuracy"] is not None:
                self._tested = f", test {percent(facts['accuracy'])}"
            self._progress.update(self._epochs, completed=facts["epoch"], note=note + self._tested)
        elif event == "trained":
            self._progress.advance(self._networks)
            self._console.print(_line(facts), highlight=False, soft_wrap=True)
        elif event == "warning":
            self._console.print(f"[yellow]note:[/] {escape(facts['text'])}", highlight=False)
        self._stop.check()


def _line(facts: dict[str, Any]) -> str:
    line = f"{facts['label']}: {percent(facts['last'])}"
    if facts["best"] > facts["last"]:
        line += f", best {percent(facts['best'])} after epoch {facts['best_epoch']}"
    if facts.get("images_per_second"):
        line += f" [dim]({facts['images_per_second']:,.0f} images/s)[/]"
    return line
