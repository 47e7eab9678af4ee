"""The events of a run or of one training, as numbers for trackers (`fedkd.runs.trackers`).

A listener of the very events that are written to metrics.jsonl and ledger.jsonl. A finished round
is logged once, so a run that goes on continues the curves where its last checkpoint is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from fedkd.config import Component, ConfigError
from fedkd.io.extras import MissingExtra
from fedkd.io.records import read_json
from fedkd.runs.directory import RunDirectory, write_json
from fedkd.runs.events import (
    ClientEvaluated,
    ClientTrained,
    EpochFinished,
    Event,
    MessageCounted,
    ReplyRefused,
    RoundFinished,
)
from fedkd.runs.results import LISTED, Summary
from fedkd.runs.trackers import TRACKERS
from fedkd.runs.trackers.base import Axis, Tracked, Tracker

HANDLES = "trackers.json"
_FILES = ("report.html", "summary.json", "config.yaml")


def check_trackers(chosen: Sequence[Component], key: str = "track") -> None:
    """Refuse trackers that do not exist or are not installed, and options that they do not have.

    Args:
        chosen: The trackers.
        key: Where they stand in the config.

    Raises:
        ConfigError: named by its key.
        MissingExtra: with the command that installs it.
    """
    names = [component.name for component in chosen]
    for place, component in enumerate(chosen):
        where = f"{key}.{place}"
        if component.name in names[:place]:
            raise ConfigError(f"{where}: {component.name!r} is named twice")
        try:
            TRACKERS.check(component.name, component.options)
            TRACKERS.get(component.name).check()  # type: ignore[attr-defined]
        except MissingExtra as error:
            raise MissingExtra(f"{where}: {error}", name=error.name) from None
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None


@contextmanager
def tracked(
    run: RunDirectory, warn: Callable[[str], None], done: int
) -> Iterator[Callable[[Summary], None]]:
    """Let the trackers of a run's config hear of its events while the block lasts.

    Args:
        run: Its folder; what is there was logged before, by earlier sessions.
        warn: Hears, once, of a tracker that fails; the run goes on without it.
        done: The last finished round.

    Yields:
        To be called at the end, with the summary, when the page is written.
    """
    if not run.experiment.track:
        yield lambda summary: None
        return
    tracking = _Tracking(run, warn, done)
    run.listeners.append(tracking.hear)

    def finish(summary: Summary) -> None:
        tracking.trackers.finish(final_numbers(summary), [run.path / name for name in _FILES])

    try:
        with tracking.trackers:
            yield finish
    finally:
        run.listeners.remove(tracking.hear)


class Trackers:
    """The trackers of a run or a training; one that fails is given up.

    A context: when it ends without an error, all is complete.

    Args:
        chosen: As in the config.
        about: What they are shown, without a handle.
        warn: Hears, once, of each that fails.
    """

    def __init__(
        self, chosen: Sequence[Component], about: Tracked, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._trackers: dict[str, Tracker] = {}
        file = about.folder / HANDLES
        handles = read_json(file, dict[str, str]) or {}
        for component in chosen:
            seen = replace(about, handle=handles.get(component.name))
            try:
                made = TRACKERS.create(component.name, seen, **component.options)
            except Exception as error:
                self._failed(component.name, error)
                continue
            self._trackers[component.name] = made
            if made.handle is not None:
                handles[component.name] = made.handle
        if handles:
            write_json(file, handles)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._each(lambda tracker: tracker.close(complete=kind is None))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[name]
                self._failed(name, error)
                with suppress(Exception):
                    tracker.close(complete=False)

    def log(self, axis: Axis, step: int, numbers: Mapping[str, float | None]) -> None:
        """Numbers of a round or an epoch, but for those that are not known."""
        scalars = _known(numbers)
        self._each(lambda tracker: tracker.log(axis, step, scalars))

    def finish(self, final: Mapping[str, float | None], files: Sequence[Path]) -> None:
        """All is done: what it came to, and its files as far as they are there."""
        there, scalars = [path for path in files if path.is_file()], _known(final)
        self._each(lambda tracker: tracker.finish(scalars, there))

    def _failed(self, name: str, error: Exception) -> None:
        first = (str(error) or type(error).__name__).splitlines()[0]
        self._warn(f"tracker {name!r} failed, so the run goes on without it: {first}")


def flat(values: Any, prefix: str = "") -> dict[str, str | float | bool]:
    """Dotted key -> value of nested sections and lists; what is not set is `null`."""
    if isinstance(values, Mapping | list) and values:
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        found: dict[str, str | float | bool] = {}
        for key, value in items:
            found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    plain = isinstance(values, str | float | int | bool)
    return {prefix: values if plain else "null" if values is None else str(values)}


def final_numbers(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What a run came to, of its summary."""
    traffic = summary["bytes"].values()
    return {
        "final/student": summary["student"]["accuracy"],
        "final/student_best": summary["student"]["best_accuracy"],
        "final/ensemble": (summary.get("ensemble") or {}).get("accuracy"),
        **{f"final/{key}": summary.get(key) for key in _FINAL},
        "final/bytes_up": sum(phase["up"] for phase in traffic),
        "final/bytes_down": sum(phase["down"] for phase in traffic),
        "final/seconds": summary["seconds"]["total"],
        "final/epsilon": (summary.get("privacy") or {}).get("worst"),
    }


_FINAL = ("oracle", "ceiling", "pseudo_labels", "worst_client")


def _known(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in numbers.items()
        if value is not None and math.isfinite(value)
    }


class _Tracking:
    def __init__(self, run: RunDirectory, warn: Callable[[str], None], done: int) -> None:
        about = run.experiment
        self._epochs = about.distillation.epochs
        self._each_client = about.clients <= LISTED
        self._total = sum(message.up + message.down for message in run.messages())
        self._waiting: dict[str, float | None] = {}
        self._bytes: Counter[str] = Counter()
        seen = Tracked(
            identity=run.identity,
            folder=run.path,
            name=about.name,
            parameters=flat(about.model_dump(mode="json", exclude={"track", "output"})),
            steps={"round": done, "epoch": done * self._epochs},
        )
        self.trackers = Trackers(about.track, seen, warn)

    def hear(self, event: Event | MessageCounted) -> None:
        """An event, as it is written down."""
        if isinstance(event, MessageCounted):
            self._bytes["up"] += event.up
            self._bytes["down"] += event.down
            if event.client is not None and self._each_client:
                self._bytes[f"client/{event.client}"] += event.up + event.down
        elif isinstance(event, ClientTrained):
            facts = {"loss": event.loss, "accuracy": event.accuracy, "seconds": event.seconds,
                     "epsilon": event.epsilon}  # fmt: skip
            if self._each_client:
                self._waiting |= {f"client/{event.client}/{k}": v for k, v in facts.items()}
            if event.epsilon is not None:
                worst = self._waiting.get("privacy/epsilon") or 0.0
                self._waiting["privacy/epsilon"] = max(worst, event.epsilon)
        elif isinstance(event, ClientEvaluated) and self._each_client and event.holdout_total:
            share = event.holdout_right / event.holdout_total
            self._waiting[f"client/{event.client}/student_holdout"] = share
        elif isinstance(event, ReplyRefused):
            self._waiting["refused"] = (self._waiting.get("refused") or 0) + 1
        elif isinstance(event, EpochFinished):
            terms = {f"epoch/{name}": value for name, value in event.terms.items()}
            step = (event.round - 1) * self._epochs + event.epoch
            self.trackers.log(
                "epoch", step, {"epoch/loss": event.loss, "epoch/lr": event.lr, **terms}
            )
            self._waiting["student/loss"] = event.loss
        elif isinstance(event, RoundFinished):
            self.trackers.log("round", event.round, {**self._waiting, **self._of_round(event)})
            self._waiting = {}

    def _of_round(self, event: RoundFinished) -> dict[str, float | None]:
        sent, self._bytes = self._bytes, Counter()
        self._total += sent["up"] + sent["down"]
        calibration = event.student.calibration
        known = [share for share in event.teachers.values() if share is not None]
        numbers: dict[str, float | None] = {
            "student/accuracy": event.student.accuracy,
            "student/ece": None if calibration is None else calibration.ece,
            "student/validation": event.validation,
            "ensemble/accuracy": None if event.ensemble is None else event.ensemble.accuracy,
            "pseudo_labels/accuracy": event.pseudo_labels,
            "teachers/mean": sum(known) / len(known) if known else None,
            "teachers/best": max(known, default=None),
            "bytes/up": sent["up"],
            "bytes/down": sent["down"],
            "bytes/total": self._total,
            "answered": len(event.answered),
            "seconds/round": sum(event.seconds.values()),
            **{f"seconds/{phase}": seconds for phase, seconds in event.seconds.items()},
        }
        if self._each_client:
            for what, shares in (("test", event.teachers), ("weight", event.weights)):
                numbers |= {f"client/{client}/{what}": v for client, v in shares.items()}
            numbers |= {f"{key}/bytes": v for key, v in sent.items() if key.startswith("client/")}
        return numbers
