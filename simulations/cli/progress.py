"""Progress of runs, studies and long commands: a bar for each thing that is counted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedkd.reporting.format import percent
from fedkd.rounds import Interrupted

_PHASES = {
    "describe": "meeting the clients",
    "train": "teachers train",
    "keys": "clients exchange keys",
    "masked": "teachers vote under masks",
    "knowledge": "teachers answer",
    "distil": "student learns",
    "evaluate": "evaluation",
    "oracle": "baseline: oracle",
    "ceiling": "baseline: ceiling",
    "report": "writing the report",
}
# Event -> (what it counts, key of how many are done, key of all).
_COUNTS = {
    "cell": ("cells", "done", "total"),
    "teacher": ("teachers", "done", "total"),
    "property": ("properties", "done", "total"),
    "permutation": ("orders", "done", "total"),
    "client": ("clients", "done", "clients"),
}
_STEP = "step"


class StopOnRequest:
    """While it is entered, Ctrl-C and SIGTERM are remembered, and `check` raises `Interrupted`.

    So a run ends in good order, where it can be gone on with. A second Ctrl-C ends the process at
    once. Batch systems send SIGTERM some time before they end a job, and may send it again.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self._asked = threading.Event()
        self._signal = signal.SIGINT
        self._on_request = on_request

    def __enter__(self) -> StopOnRequest:
        both = (signal.SIGINT, signal.SIGTERM)
        self._before = {each: signal.signal(each, self._interrupt) for each in both}
        return self

    def __exit__(self, *_: object) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)

    def _interrupt(self, number: int, _: object) -> None:
        if self._asked.is_set():
            if number == signal.SIGINT:
                os._exit(130)
            return
        self._signal = signal.Signals(number)
        self._asked.set()
        self._on_request()

    @property
    def asked(self) -> bool:
        """Whether the work is to stop."""
        return self._asked.is_set()

    def check(self) -> None:
        """Raise `Interrupted`, with the signal, if the work is to stop."""
        if self.asked:
            raise Interrupted(self._signal)


class ProgressView:
    """A `Notify` that shows progress on a console: bars on a terminal, and a line per result.

    While it is shown, Ctrl-C or SIGTERM ends the work in good order: the next event raises
    `Interrupted` where it came from, so that Flower and Ray shut down as after an error.
    """

    def __init__(self, console: Console, title: str = "") -> None:
        self._console, self._title = console, title
        self._stop = StopOnRequest(self._show_request)
        self._bars: dict[str, Any] = {}
        self._tested = ""
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

    def __enter__(self) -> ProgressView:
        self._stop.__enter__()
        if self._title:
            self._console.print(self._title, highlight=False, soft_wrap=True, markup=False)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._stop.__exit__()

    def __call__(self, event: str, **facts: Any) -> None:
        """One event. Raises `Interrupted` after Ctrl-C or SIGTERM."""
        self._stop.check()
        if event in _COUNTS:
            name, done, total = _COUNTS[event]
            self._bar(
                name, facts[done], facts[total], note=facts.get("note") or facts.get("label", "")
            )
        elif event == "round_start":
            self._bar("rounds", facts["round"] - 1, facts["rounds"])
        elif event == "plan":
            self._bar("networks", 0, facts["trainings"])
        elif event in ("phase", "training"):
            phase = facts.get("phase")
            label = facts["label"] if phase is None else _PHASES.get(phase, phase)
            self._begin(label, facts.get("epochs", facts.get("total")))
        elif event == "reply":
            self._advance(_STEP)
        elif event == "epoch":
            self._epoch(facts)
        elif event == "round":
            self._round(facts)
        elif event == "cell_done" or (event == "trained" and facts.get("role") != "student"):
            self._advance("networks")  # a student is its cell
            self._print(_result(facts))
        elif event in ("refused", "warning"):
            self._print(_remark(facts))

    def _bar(self, name: str, done: int, total: int | None, *, note: str = "") -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, note="")
        self._progress.update(self._bars[name], completed=done, total=total, note=note)

    def _begin(self, label: str, total: int | None) -> None:
        self._bar(_STEP, 0, total)
        self._progress.reset(self._bars[_STEP], total=total, description=label)
        self._tested = ""

    def _advance(self, name: str) -> None:
        if name in self._bars:
            self._progress.advance(self._bars[name])

    def _epoch(self, facts: dict[str, Any]) -> None:
        if _STEP not in self._bars:
            self._begin("epochs", None)
        if facts.get("accuracy") is not None:
            self._tested = f", test {percent(facts['accuracy'])}"
        note = f"loss {facts['loss']:.4g}{self._tested}"
        self._progress.update(self._bars[_STEP], completed=facts["epoch"], note=note)

    def _round(self, facts: dict[str, Any]) -> None:
        if "student" in facts:
            self._advance("rounds")
            self._print(_finished(facts))
        else:
            note = f"accuracy {percent(facts['accuracy'])}"
            self._bar("rounds", facts["round"], facts["rounds"], note=note)

    def _print(self, line: str) -> None:
        if line:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _show_request(self) -> None:
        for bar in self._bars.values():
            self._progress.update(bar, note="stops after this step (again: at once)")


def _finished(facts: dict[str, Any]) -> str:
    teachers = facts.get("teachers") or {}
    known = [value for value in teachers.values() if value is not None]
    weightless = sum(weight == 0 for weight in (facts.get("weights") or {}).values())
    degraded = "" if facts["status"] == "ok" else " degraded"
    shown = {
        f"round {facts['round']}{degraded}, student": facts["student"]["accuracy"],
        "ensemble": (facts.get("ensemble") or {}).get("accuracy"),
        "best teacher": max(known, default=None),
        "pseudo-labels": facts.get("pseudo_labels"),
    }
    line = ", ".join(f"{name} {percent(value)}" for name, value in shown.items())
    answered = f"{len(facts['answered'])}" + (f", {weightless} without weight" * bool(weightless))
    return f"{line}, answered {answered}"


def _result(facts: dict[str, Any]) -> str:
    """A finished cell or network; nothing where its numbers have no meaning alone."""
    label = escape(facts["label"])
    if "error" in facts:
        return f"[red]{label}: failed:[/] {escape(facts['error'])}"
    last = facts.get("final", facts.get("last"))
    if last is None:
        return ""
    line = f"{label}: {percent(last)}"
    if facts["best"] > last:
        epoch, round_number = facts.get("best_epoch"), facts.get("best_round")
        when = f"in round {round_number}" if epoch is None else f"after epoch {epoch}"
        line += f", best {percent(facts['best'])} {when}"
    if facts.get("images_per_second"):
        line += f" [dim]({facts['images_per_second']:,.0f} images/s)[/]"
    return line + (f" [dim]({facts['wall']:.0f} s)[/]" if "wall" in facts else "")


def _remark(facts: dict[str, Any]) -> str:
    if "text" in facts:
        return f"[yellow]note:[/] {escape(facts['text'])}"
    who = "a node" if facts["client"] is None else f"client {facts['client']}"
    where = f"round {facts['round']}, {facts['phase']}: " if "phase" in facts else ""
    return f"[yellow]{where}{who} left out:[/] {escape(facts['reason'])}"
