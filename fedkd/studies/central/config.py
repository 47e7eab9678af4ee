"""A study as typed, validated objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedkd.config import (
    Component,
    NamedList,
    Optimizer,
    Positive,
    Section,
    Student,
    Term,
    Terms,
    load_config,
    make_config,
    merged,
    validate,
)
from fedkd.registry import nearest

BASELINE = "student"
"""Name of the method that has no teacher; every study runs it."""


class Data(Section):
    """Labelled images."""

    dataset: Component = Component(name="digits")
    root: str | None = Field(default=None, description="folder of local data; default: FEDKD_DATA")
    train: Positive | None = Field(default=None, description="training images used; default: all")
    test: Positive | None = Field(default=None, description="test images used; default: all")


def _sgd(value: Any) -> Any:
    return {"name": "sgd", **value} if isinstance(value, Mapping) else value


class Recipe(Section):
    """How one network is trained. A method or teacher may say otherwise key by key.

    The defaults are those of the field's tables (CIFAR-100, 240 epochs of SGD).
    """

    epochs: Positive = 240
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Annotated[Optimizer, BeforeValidator(_sgd)] = Optimizer(name="sgd")
    augment: str = Field(default="crop_flip", description="recipe of the images")
    virtual: str = Field(
        default="batch_randaugment_flip", description="recipe of the virtual view, if a loss asks"
    )
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = Field(default=False, description="torch.compile: pays on a GPU")
    channels_last: bool = Field(default=False, description="memory layout: pays on a GPU")
    test_every: Positive = Field(
        default=1, description="epochs between looks at the test set; the last is always tested"
    )
    checkpoint_every: Positive = Field(default=10, description="epochs between checkpoints")


def _source(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, Mapping) and "name" in value):
        return {"model": value}
    return value


def _sources(value: Any) -> Any:
    if isinstance(value, str | Mapping):
        value = [value]
    return [_source(item) for item in value] if isinstance(value, Sequence) else value


class Source(Section):
    """One teacher: trained here, or read from a file."""

    model: Component
    checkpoint: str | None = Field(default=None, description="weights; default: trained first")
    train: Positive | None = Field(
        default=None, description="training images it learns from; default: data.train"
    )
    recipe: dict[str, Any] = Field(default={}, description="what differs from `recipe`")


class Method(Section):
    """One way to learn from the teachers."""

    losses: Terms
    recipe: dict[str, Any] = Field(default={}, description="what differs from `recipe`")
    assistants: NamedList | None = Field(
        default=None, description="networks in between, large to small; default: the study's"
    )
    guidance: Literal["next", "dense"] | None = Field(default=None, description="likewise")


def _method(value: Any) -> Any:
    """`kd`, `{name: kd, ...}` and a list of such stand for the losses alone."""
    bare = isinstance(value, str | list | tuple) or (isinstance(value, Mapping) and "name" in value)
    return {"losses": value} if bare else value


def _methods(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    # `crd: null` takes out what a base file has put in.
    return {name: _method(method) for name, method in value.items() if method is not None}


MethodName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class Resources(Section):
    """Compute. The number of threads is part of the config: results on CPU depend on it."""

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1")
    threads: Positive = 1


class Study(Section):
    """Everything one comparison of methods needs."""

    name: str = Field(default="study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(lambda value: [value] if isinstance(value, int) else value),
    ] = Field(default=(0,), min_length=1)
    plugins: tuple[str, ...] = Field(
        default=(), description="modules to import: they register themselves"
    )
    output: str = Field(default="runs", description="folder for run directories")
    data: Data = Data()
    teachers: Annotated[tuple[Source, ...], BeforeValidator(_sources)] = Field(min_length=1)
    teachers_per_seed: bool = Field(default=False, description="train teachers anew for each seed")
    student: Student = Student()
    assistants: NamedList = Field(
        default=(), description="networks trained in between, large to small"
    )
    guidance: Literal["next", "dense"] = Field(
        default="next", description="learn from the next larger network (TAKD) or all (DGKD)"
    )
    methods: Annotated[dict[MethodName, Method], BeforeValidator(_methods)] = Field(
        default={}, description="name -> losses, or losses and what differs from the study"
    )
    only: Names | None = Field(default=None, description="methods to run; default: all")
    recipe: Recipe = Recipe()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _possible(self) -> Study:
        repeated = [seed for seed, times in Counter(self.seeds).items() if times > 1]
        if repeated:
            raise ValueError(f"seeds: {repeated[0]} is listed twice")
        known = [BASELINE, *self.methods]
        for name in self.only or ():
            if name not in known:
                raise ValueError(
                    f"only: there is no method {name!r}{nearest(name, known)} "
                    f"(methods: {', '.join(known)})"
                )
        for number, source in enumerate(self.teachers):
            self._adjusted(source.recipe, f"teachers.{number}.recipe")
            if source.checkpoint is not None and self.teachers_per_seed:
                raise ValueError(
                    f"teachers_per_seed: teacher {number} has a checkpoint, so it is the same "
                    "for every seed"
                )
        for name, method in self.methods.items():
            self._adjusted(method.recipe, f"methods.{name}.recipe")
        return self

    def runs(self) -> dict[str, Method]:
        """Name -> method, in order: the student alone, then those chosen."""
        everything = {BASELINE: Method(losses=(Term(name="ce"),)), **self.methods}
        chosen = set(everything if self.only is None else self.only) | {BASELINE}
        return {name: everything[name] for name in everything if name in chosen}

    def assistants_of(self, name: str) -> tuple[Component, ...]:
        """Networks between the teachers and the student of a method."""
        own = self.runs()[name].assistants
        if name == BASELINE:
            return ()
        return self.assistants if own is None else own

    def guidance_of(self, name: str) -> str:
        """How a method's chain is taught."""
        return self.runs()[name].guidance or self.guidance

    def recipe_of(self, name: str) -> Recipe:
        """How students and assistants of a method are trained."""
        return self._adjusted(self.runs()[name].recipe, f"methods.{name}.recipe")

    def teacher_recipe(self, number: int) -> Recipe:
        """How a teacher is trained."""
        return self._adjusted(self.teachers[number].recipe, f"teachers.{number}.recipe")

    def _adjusted(self, changes: Mapping[str, Any], where: str) -> Recipe:
        values = merged(self.recipe.model_dump(mode="json"), changes)
        return validate(Recipe, values, where)


def load_study(path: str | Path, overrides: Sequence[str] = (), *, plugins: bool = True) -> Study:
    """Read a study's file and apply `key=value` overrides. Raises `ConfigError`."""
    return load_config(Study, path, overrides, plugins=plugins)


def make_study(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Study:
    """Plain values and overrides -> a checked study. Raises `ConfigError`."""
    return make_config(Study, values, overrides)
