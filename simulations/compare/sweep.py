"""A privacy sweep as a typed, validated object: an experiment, seeds, budgets, mechanisms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedkd.config import Experiment, Positive
from fedkd.rounds.outlook import Outlook, outlook
from fedkd.simulations.compare.config import SideBySideConfig
from fedkd.simulations.compare.entries import Entry, label, measured
from fedkd.studies.config import Name, RowName, changed, distinct

# Where a mechanism lives in the config, and so where its epsilon goes.
PLACES = ("teachers.privacy", "release")


def _epsilons(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return [math.inf if item == "inf" else item for item in values]


class Sweep(SideBySideConfig):
    """Utility against budget.

    A mechanism is a set of changes, dotted key -> value, among them `teachers.privacy` or `release`
    without its epsilon. At epsilon `inf` that one key is taken out and all others stay: the
    non-private path of the same federation.
    """

    study: Literal["privacy sweep"] = "privacy sweep"
    name: Name = "sweep"
    epsilons: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=True)], ...], BeforeValidator(_epsilons)
    ] = Field(default=(math.inf, 10.0, 5.0, 2.0, 1.0), min_length=1)
    draws: Positive = Field(
        default=1, description="runs of a release row for each seed: same teachers, fresh noise"
    )
    mechanisms: dict[RowName, dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_is_one(self) -> Sweep:
        distinct(self.epsilons, "epsilons")
        for name, changes in self.mechanisms.items():
            places = [place for place in PLACES if place in changes]
            if len(places) != 1 or not isinstance(changes[places[0]], Mapping):
                raise ValueError(
                    f"mechanisms.{name}: needs exactly one of {' and '.join(PLACES)}, as a mapping"
                )
            if "epsilon" in changes[places[0]]:
                raise ValueError(
                    f"mechanisms.{name}.{places[0]}: leave epsilon out, `epsilons` lists them"
                )
        return self

    def entries(self) -> list[Entry]:
        """The rows: mechanisms outside, budgets inside. Raises `ConfigError`."""
        base = measured(self.base_experiment, clients=False)
        return [
            _entry(base, name, changes, epsilon)
            for name, changes in self.mechanisms.items()
            for epsilon in self.epsilons
        ]

    def outlooks(self) -> dict[str, Outlook]:
        """What each private row promises and how much noise that takes. Raises `ConfigError`."""
        ahead = {entry.name: outlook(entry.experiment) for entry in self.entries()}
        return {name: one for name, one in ahead.items() if one is not None}


def _entry(base: Experiment, name: str, changes: Mapping[str, Any], epsilon: float) -> Entry:
    (place,) = (place for place in PLACES if place in changes)
    private = {**changes[place], "epsilon": 1.0 if math.isinf(epsilon) else epsilon}
    word = budget(epsilon)
    # What leaves the server besides must be settled before a release is set.
    ordered = {**{key: v for key, v in changes.items() if key != place}, place: private}
    experiment = changed(base, ordered, f"mechanisms.{name} at epsilon {word}")
    if math.isinf(epsilon):  # taken out of the finished config, whose defaults follow from it
        teachers = experiment.teachers.model_copy(update={"privacy": None})
        experiment = experiment.model_copy(update={"teachers": teachers, "release": None})
    if place == "teachers.privacy":  # answers about test images are covered
        seen = experiment.evaluation.model_copy(update={"teachers": True})
        experiment = experiment.model_copy(update={"evaluation": seen})
    about = label(changes[place])
    return Entry(f"{name}-{word}", experiment, None, about, {"mechanism": name, "epsilon": word})


def budget(epsilon: float) -> str:
    """`2`, `0.5`, `inf`."""
    return f"{epsilon:g}"
