"""What is run side by side: named experiments, each with fedkd's own rounds or a baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedkd.config import Component, Experiment


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: Unique; also the name of its folder.
        experiment: What is run, but for the seed.
        baseline: Who runs it instead of fedkd.
        about: What it changes, for the reader.
        choices: Ablation: factor -> what was chosen.
    """

    name: str
    experiment: Experiment
    baseline: Component | None = None
    about: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`fedkd`, or the name of the baseline."""
        return "fedkd" if self.baseline is None else self.baseline.name

    def seeded(self, seed: int) -> Experiment:
        """The experiment of one seed."""
        return self.experiment.model_copy(update={"seed": seed})


def measured(experiment: Experiment, *, clients: bool = True) -> Experiment:
    """The experiment with evaluation as all methods get it.

    The teachers' test answers and the label-trained baselines of a run cost time and messages
    and change no student.
    """
    evaluation = experiment.evaluation.model_copy(
        update={"teachers": False, "clients": clients, "baselines": ()}
    )
    return experiment.model_copy(update={"evaluation": evaluation})


def label(value: Any) -> str:
    """A choice in few words: `dkd beta=2 + vrm`."""
    if isinstance(value, Mapping):
        rest = [f"{key}={label(item)}" for key, item in value.items() if key != "name"]
        return " ".join(([str(value["name"])] if "name" in value else []) + rest)
    if isinstance(value, list | tuple):
        return " + ".join(map(label, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def slug(name: str) -> str:
    """A name as a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-") or "-"
