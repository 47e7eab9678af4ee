"""What the configs of all studies have in common."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from fedkd.config import ConfigError, Section, overridden
from fedkd.io.text import nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
#: Name of a row: also of its folder.
RowName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]

Only = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(description="methods to run; default: all"),
]


def check_only(only: Sequence[str] | None, known: list[str]) -> None:
    """Raises `ValueError` if a method that is to be run does not exist."""
    for name in only or ():
        if name not in known:
            raise ValueError(
                f"only: there is no method {name!r}{nearest(name, known)} "
                f"(methods: {', '.join(known)})"
            )


def distinct(values: Sequence[object], where: str) -> None:
    """Raises `ValueError` if a value is listed twice."""
    for value, times in Counter(values).items():
        if times > 1:
            raise ValueError(f"{where}: {value!r} is listed twice")


class StudyConfig(Section):
    """A study: what is varied, and below `experiment:` what stays the same, as in a run's config.

    Subclasses add `study`, the name of the command that takes the file, and `experiment`, the
    section that is varied.
    """

    #: Keys of earlier versions -> where they are now.
    moved: ClassVar[Mapping[str, str]] = {}

    study: str
    name: Name = "study"
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(lambda value: [value] if isinstance(value, int) else value),
    ] = Field(
        default=(0,), min_length=1, description="one run for each; default: the experiment's seed"
    )
    output: str = Field(default="runs", description="folder of the study's folder")
    experiment: Section

    @property
    def plugins(self) -> tuple[str, ...]:
        """Modules to import: they register themselves."""
        return tuple(getattr(self.experiment, "plugins", ()))

    @model_validator(mode="before")
    @classmethod
    def _keys_in_their_place(cls, values: Any) -> Any:
        """What a run's config has on top stands below `experiment:` in every study."""
        inner = cls.model_fields["experiment"].annotation
        for key in values if isinstance(values, Mapping) and isinstance(inner, type) else ():
            if key in cls.moved:
                raise ValueError(f"{key}: is now {cls.moved[key]}")
            if key not in cls.model_fields and key in getattr(inner, "model_fields", {}):
                raise ValueError(
                    f"{key}: a study has this key in its experiment; write experiment.{key} "
                    f"(in the file: {key} below experiment:)"
                )
        return values

    @model_validator(mode="after")
    def _own_seed(self) -> StudyConfig:
        if "seeds" not in self.model_fields_set:
            self.__dict__["seeds"] = (getattr(self.experiment, "seed", 0),)
        distinct(self.seeds, "seeds")
        return self


Root = TypeVar("Root", bound=Section)


def changed(experiment: Root, changes: Mapping[str, Any], where: str) -> Root:
    """An experiment with dotted keys set anew. Raises `ConfigError` that starts with `where`."""
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    try:
        return overridden(experiment, words)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
