"""What a tracker is shown of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Axis = Literal["round", "epoch"]
"""What a step counts: rounds, or the student's epochs over all rounds."""


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked.

    Attributes:
        identity: Name of its folder; the same when it goes on.
        folder: Its folder.
        name: Of the experiment.
        parameters: Dotted key -> value of the config, all defaults written out.
        steps: Axis -> the last step that was logged before the run went on; 0 in a new one.
        handle: What the tracker called this run when it was new; None in a new one.
    """

    identity: str
    folder: Path
    name: str
    parameters: Mapping[str, str | float | bool]
    steps: Mapping[Axis, int]
    handle: str | None = None


class Tracker(ABC):
    """Where the numbers of one run go. Whatever it raises costs the run its tracker, no more.

    Made with the run as its one argument, and with its options. A library is imported in there, by
    `fedkd.io.extras.extra`; `check` is called before there is a run.
    """

    #: What it calls this run, if it is not called as its folder: kept for when the run goes on.
    handle: str | None = None

    @classmethod
    @abstractmethod
    def check(cls) -> None:
        """Raise `MissingExtra` where its library is not installed."""

    @abstractmethod
    def log(self, axis: Axis, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of a round or an epoch, named as `student/accuracy`."""

    @abstractmethod
    def finish(self, final: Mapping[str, float], files: Sequence[Path]) -> None:
        """The run is complete: what it came to, and its page, summary and config."""

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """Nothing more comes from this process; if the run is not complete, it may go on later."""
