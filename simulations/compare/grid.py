"""An ablation as a typed, validated object: an experiment, seeds, a grid of choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import Field, model_validator

from fedkd.config import ConfigError, Experiment
from fedkd.io.text import nearest
from fedkd.simulations.compare.config import SideBySideConfig
from fedkd.simulations.compare.entries import Entry, label, measured, slug
from fedkd.studies.config import Name, changed, distinct

EXPERIMENT = "experiment"
"""The factor that tells data sets apart."""


@dataclass(frozen=True)
class Choice:
    """One value of a factor: its label, and dotted key -> value."""

    label: str
    changes: Mapping[str, Any]


class Ablation(SideBySideConfig):
    """A grid of fedkd's own options.

    A factor called as a key of the experiment (`fusion`, `distillation.losses`) lists values,
    or names them: `{plain: [dkd], relations: [dkd, vrm]}`. Any other factor names sets of changes:
    `{small: {student.model: mlp}, large: {student.model: resnet20, distillation.epochs: 40}}`.
    """

    study: Literal["ablate"] = "ablate"
    name: Name = "ablate"
    grid: dict[str, Any] = Field(min_length=1, description="factor -> choices")
    mode: Literal["grid", "each"] = Field(
        default="grid", description="all combinations, or each factor alone from the first choices"
    )
    experiments: dict[str, dict[str, Any]] = Field(
        default={}, description="several settings: name -> dotted key -> value"
    )

    @model_validator(mode="after")
    def _grid_is_one(self) -> Ablation:
        for factor, choices in self.factors().items():
            distinct([choice.label for choice in choices], f"grid.{factor}")
        return self

    def factors(self) -> dict[str, list[Choice]]:
        """Factor -> its choices, the reference first."""
        return {factor: _choices(factor, given) for factor, given in self.grid.items()}

    def cells(self) -> list[dict[str, Choice]]:
        """The combinations that are run: factor -> choice."""
        factors = self.factors()
        if self.mode == "grid":
            return [dict(zip(factors, cell, strict=True)) for cell in product(*factors.values())]
        first = {factor: choices[0] for factor, choices in factors.items()}
        return [
            first,
            *(
                {**first, factor: choice}
                for factor, choices in factors.items()
                for choice in choices[1:]
            ),
        ]

    def entries(self) -> list[Entry]:
        """The rows: experiments outside, cells inside. Raises `ConfigError`."""
        base = measured(self.base_experiment)
        rows = []
        for setting, given in (self.experiments or {"": {}}).items():
            start = changed(base, given, f"experiments.{setting}") if given else base
            for cell in self.cells():
                experiment = start
                for factor, choice in cell.items():
                    where = f"grid.{factor}, {choice.label}"
                    experiment = changed(experiment, choice.changes, where)
                choices = {factor: choice.label for factor, choice in cell.items()}
                if setting:
                    choices = {EXPERIMENT: setting, **choices}
                name = slug("_".join(choices.values()))
                rows.append(Entry(name, measured(experiment), None, "", choices))
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            raise ConfigError("grid: two cells have the same name; give their choices other names")
        return rows


def _choices(factor: str, given: Any) -> list[Choice]:
    fields = list(Experiment.model_fields)
    if factor.split(".")[0] not in fields:
        if not isinstance(given, Mapping) or not all(
            isinstance(changes, Mapping) for changes in given.values()
        ):
            raise ValueError(
                f"grid.{factor}: no key of the experiment{nearest(factor, fields)}; a factor of "
                "another name has choices of the form {choice: {key: value}}"
            )
        found = [Choice(str(name), changes) for name, changes in given.items()]
    elif factor == "seed":
        raise ValueError("grid.seed: use `seeds`, over which means are taken")
    elif isinstance(given, Mapping):
        found = [Choice(label(name), {factor: value}) for name, value in given.items()]
    elif isinstance(given, list):
        found = [Choice(label(value), {factor: value}) for value in given]
    else:
        found = []
    if not found:
        raise ValueError(f"grid.{factor}: expected a list of values or a mapping, got {given!r}")
    return found
