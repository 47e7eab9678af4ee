"""Which round's student leaves a run, and when there is no further round.

The last round's, or with `evaluation.best` the one that was best on the validation images. The test
images have no say in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedkd.config import Experiment
from fedkd.runs.events import RoundFinished

Validated = Mapping[int, float | None]
"""Round -> its student's accuracy on the validation images."""


def validated(rounds: Iterable[RoundFinished]) -> dict[int, float | None]:
    """That of finished rounds."""
    return {event.round: event.validation for event in rounds}


def kept_round(experiment: Experiment, done: Validated) -> int | None:
    """The round whose student leaves the run, of those done; of equals the first. None of none."""
    if not done:
        return None
    if not experiment.evaluation.best:
        return max(done)
    return max(done, key=lambda number: (done[number] or 0.0, -number))


def is_over(experiment: Experiment, done: Validated) -> bool:
    """Whether no further round comes: all are done, or `evaluation.patience` is at its end."""
    last, patience = max(done, default=0), experiment.evaluation.patience
    if last >= experiment.rounds:
        return True
    best = kept_round(experiment, done)
    return patience is not None and best is not None and last - best >= patience
