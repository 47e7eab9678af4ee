"""A comparison as a typed, validated object: an experiment, seeds, methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedkd.config import Component, ConfigError, Experiment, Section
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.compare.entries import Entry, label, measured
from fedkd.studies.config import Name, Only, RowName, StudyConfig, changed, check_only, distinct

OURS = "fedkd"

# What makes a comparison fair. Views are made on every machine alike and train no teacher.
_SHARED = ("seed", "clients", "data")
_FREE = ("data.views",)


class Method(Section):
    """One row of the comparison: fedkd with changes, or a baseline with options."""

    name: RowName
    fedkd: dict[str, Any] | None = Field(default=None, description="dotted key -> value")
    baseline: Component | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Method:
        if (self.fedkd is None) == (self.baseline is None):
            raise ValueError(f"{self.name!r} is either fedkd or a baseline, not both")
        return self


def _method(value: Any) -> Any:
    """`fedavg`, `{name: fedprox, mu: 0.1}`, `{name: mine, baseline: fedprox, mu: 0.1}`."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        return value
    named = value["name"]
    if "fedkd" in value and value["fedkd"] is not None:
        return value
    options = {key: item for key, item in value.items() if key not in ("name", "fedkd")}
    if named == OURS and "baseline" not in options:
        if options:
            key = next(iter(options))
            raise ValueError(f"{OURS!r}: what it changes belongs below `fedkd:` (got {key!r})")
        return {"name": named, "fedkd": {}}
    baseline = options.pop("baseline", named)
    if isinstance(baseline, str):
        baseline = {"name": baseline, **options}
    return {"name": named, "baseline": baseline}


def _methods(value: Any) -> Any:
    return [_method(item) for item in value] if isinstance(value, list | tuple) else value


class SideBySideConfig(StudyConfig):
    """What comparisons, ablations and sweeps have in common: variants of one experiment.

    Changes are `{dotted key of the experiment: value}`.
    """

    experiment: Experiment = Experiment()

    @abstractmethod
    def entries(self) -> list[Entry]:
        """The rows, in order. Raises `ConfigError` for what does not exist."""

    @property
    def base_experiment(self) -> Experiment:
        """The experiment that rows change, under the study's name."""
        return self.experiment.model_copy(update={"name": self.name, "output": self.output})


class Comparison(SideBySideConfig):
    """fedkd, as it is or changed, beside baselines."""

    study: Literal["compare"] = "compare"
    name: Name = "compare"
    methods: Annotated[tuple[Method, ...], BeforeValidator(_methods)] = Field(min_length=1)
    only: Only = None

    @model_validator(mode="after")
    def _no_name_twice(self) -> Comparison:
        names = [method.name for method in self.methods]
        distinct(names, "methods")
        check_only(self.only, names)
        return self

    def entries(self) -> list[Entry]:
        """The rows, in order. Raises `ConfigError` for what does not exist."""
        chosen = self.only or tuple(method.name for method in self.methods)
        base = measured(self.base_experiment)
        return [_entry(base, method) for method in self.methods if method.name in chosen]


def _entry(base: Experiment, method: Method) -> Entry:
    if method.baseline is not None:
        baseline = method.baseline
        try:
            BASELINES.check(baseline.name, baseline.options)
        except ValueError as error:
            raise ConfigError(f"methods.{method.name}: {error}") from None
        about = label(baseline.options)
        if method.name != baseline.name:
            about = f"{baseline.name} {about}".strip()
        return Entry(method.name, base, baseline, about)
    changes = method.fedkd or {}
    wrong = [key for key in changes if _within(key, _SHARED) and not _within(key, _FREE)]
    experiment = base if wrong else changed(base, changes, f"methods.{method.name}.fedkd")
    if experiment.federation.participation != base.federation.participation:
        wrong = ["federation.participation"]
    if wrong:
        raise ConfigError(
            f"methods.{method.name}.fedkd: {wrong[0]} is the same for all methods; set it for the "
            "whole comparison, below experiment:"
        )
    about = ", ".join(f"{key}: {label(value)}" for key, value in changes.items())
    return Entry(method.name, measured(experiment), None, about)


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
