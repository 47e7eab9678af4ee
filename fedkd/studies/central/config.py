"""The config of a study of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fedkd.config import (
    Component,
    Domains,
    Energy,
    HeadNames,
    Known,
    LabelNoise,
    Modalities,
    Modality,
    NamedList,
    Noisy,
    Optimizer,
    Positive,
    Section,
    Student,
    Switch,
    Term,
    Terms,
    check_heads,
    check_modalities,
    dealt_heads,
    with_targets,
)
from fedkd.studies.config import Name, Only, RowName, StudyConfig, changed, check_only

BASELINE = "student"
"""Name of the method that has no teacher; every study runs it."""


class Data(Section):
    """Labelled images."""

    dataset: Component = Component(name="digits")
    root: str | None = Field(default=None, description="folder of local data; default: FEDKD_DATA")
    train: Positive | None = Field(default=None, description="training images used; default: all")
    test: Positive | None = Field(default=None, description="test images used; default: all")
    pairs: dict[Modality, Component] = Field(
        default={}, description="modality -> data set, instead of dataset: samples are pairs"
    )
    by: Literal["class", "index"] = Field(
        default="class", description="`pairs`: at random within a class, or the same places"
    )
    label_noise: LabelNoise | None = Field(
        default=None, description="wrong labels among the training images, the same for every seed"
    )
    domains: Domains | None = Field(
        default=None, description="domains of the teachers' images, and of the students'"
    )

    @model_validator(mode="after")
    def _one_place(self) -> Data:
        if self.label_noise is not None and self.label_noise.clients != 1:
            raise ValueError(
                f"label_noise.clients: a study has none, got {self.label_noise.clients:g}; leave "
                "it out"
            )
        if self.domains is not None and self.pairs:
            raise ValueError(
                "domains: shifts images of one modality, pairs have several; leave one out"
            )
        if self.label_noise is not None and self.pairs:
            raise ValueError(
                "label_noise: wrong labels would make wrong pairs too (data.by class); leave out "
                "one of both"
            )
        return self


def _sgd(value: Any) -> Any:
    return {"name": "sgd", **value} if isinstance(value, Mapping) else value


class Training(Section):
    """How networks are trained.

    The defaults are those of the field's tables (CIFAR-100, 240 epochs of SGD).
    """

    epochs: Positive = 240
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Annotated[Optimizer, BeforeValidator(_sgd)] = Optimizer(name="sgd")
    augment: str = Field(default="crop_flip", description="recipe of the images")
    virtual: str = Field(
        default="randaugment_flip", description="recipe of the virtual view, if a loss asks"
    )
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    compile: bool = Field(default=False, description="torch.compile: pays on a GPU")
    channels_last: bool = Field(default=False, description="memory layout: pays on a GPU")
    test_every: Positive = Field(
        default=1, description="epochs between looks at the test set; the last is always tested"
    )
    checkpoint_every: Positive = Field(default=10, description="epochs between checkpoints")
    noisy: Noisy | None = Field(
        default=None, description="how labels of which some are wrong are learnt from"
    )

    @model_validator(mode="after")
    def _plain_arithmetic(self) -> Training:
        if self.noisy is not None and (self.precision != "float32" or self.compile):
            raise ValueError(
                f"noisy: computes in float32 and is not compiled, got precision {self.precision} "
                f"and compile {self.compile}; set precision=float32 and compile=false"
            )
        return self

    def check_noisy(self, models: Sequence[Component]) -> None:
        """Refuse phases that never come, and pairs that are none. Raises `ValueError`."""
        for model in models if self.noisy is not None else ():
            assert self.noisy is not None
            try:
                self.noisy.check(model, self.epochs, f"{self.epochs} epochs")
            except ValueError as error:
                raise ValueError(f"noisy.{error}") from None


class Teachers(Training):
    """The teachers: trained here, or read from files."""

    models: NamedList = Field(min_length=1)
    train: Positive | tuple[Positive, ...] | None = Field(
        default=None, description="training images of all, or of each; default: data.train"
    )
    checkpoints: tuple[str | None, ...] = Field(
        default=(), description="of each, a file of weights; default: trained first"
    )
    per_seed: bool = Field(default=False, description="train them anew for each seed")
    classes: Known = Field(
        default=None, description="of each, the classes that it knows, by name or number"
    )
    modality: Modalities = Field(
        default=(), description="what they see, of data.pairs: all the same, or each its own"
    )
    heads: HeadNames = Field(
        default=(), description="the one of student.heads that each knows, dealt in turn; all"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Teachers:
        count = len(self.models)
        given: dict[str, Any] = {
            "checkpoints": self.checkpoints,
            "train": self.train,
            "classes": self.classes,
            "modality": self.modality if len(self.modality) > 1 else (),
        }
        for key, values in given.items():
            if isinstance(values, tuple) and len(values) not in (0, count):
                raise ValueError(f"{key}: expected one for each of {count} models, got {values}")
        if self.per_seed and any(self.checkpoints):
            raise ValueError("per_seed: a teacher with a checkpoint is the same for every seed")
        if self.noisy is not None and any(self.checkpoints):
            raise ValueError("noisy: a teacher with a checkpoint is not trained; leave out one")
        if self.noisy is not None and self.classes is not None:
            raise ValueError("noisy: takes every teacher to know every class; leave out classes")
        self.check_noisy(self.models)
        return self

    def checkpoint_of(self, number: int) -> str | None:
        """A teacher's file of weights."""
        return self.checkpoints[number] if self.checkpoints else None

    def modality_of(self, number: int) -> str:
        """What a teacher sees; empty where there are no pairs."""
        return self.modality[number % len(self.modality)] if self.modality else ""

    def train_of(self, number: int) -> int | None:
        """How many images a teacher is trained on; None: those in use."""
        return self.train[number] if isinstance(self.train, tuple) else self.train


class Noise(Section):
    """What is left out at random while the student trains; nothing in evaluation."""

    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the head's input")
    survival: float = Field(
        default=1.0, gt=0, le=1, description="chance of the last residual block to be kept"
    )


class Distillation(Training):
    """How a student, and networks in between, learn from the teachers."""

    losses: Terms = (Term(name="ce"), Term(name="kd"))
    assistants: NamedList = Field(
        default=(), description="networks trained in between, large to small"
    )
    assistant_mode: Literal["takd", "dgkd"] = Field(
        default="takd", description="learn from the next larger network (TAKD) or all (DGKD)"
    )
    generations: Positive = Field(
        default=1, description="students in a row, each the teacher of the next (born again)"
    )
    unlabelled: int = Field(
        default=0, ge=0, description="more training images, whose classes the teachers name"
    )
    teachers_see: Literal["augmented", "clean"] = Field(
        default="augmented", description="the images as the student sees them, or as they are"
    )
    noise: Noise = Noise()

    @model_validator(mode="after")
    def _labels_alone(self) -> Distillation:
        names = [term.name for term in self.losses]
        if self.noisy is not None and (names != ["ce"] or self.assistants):
            raise ValueError(
                "noisy: such a student learns from the given labels and from no teacher; set "
                f"losses=[ce] and assistants=[], got losses {', '.join(names)}"
            )
        return self


class Resources(Section):
    """Compute. The number of threads is part of the config: results on CPU depend on it."""

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1")
    server_threads: Positive = 1
    graphs: Switch = Field(
        default="auto", description="capture training steps as CUDA graphs: auto (on GPUs), on, off"
    )
    deterministic: bool = Field(
        default=False, description="the same seed gives the same student on a GPU too; slower"
    )
    ray_address: str | None = Field(
        default=None, description="Ray cluster for --jobs: auto, HOST:PORT; default: this machine"
    )
    energy: Energy = Energy()


class Central(Section):
    """One distillation with all data in one place; keys as in a run's config."""

    plugins: tuple[str, ...] = Field(
        default=(), description="modules to import: they register themselves"
    )
    track: NamedList = Field(
        default=(), description="trackers that hear of every training: tensorboard, wandb, mlflow"
    )
    data: Data = Data()
    teachers: Teachers
    student: Student = Student()
    distillation: Distillation = Distillation()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _targets(self) -> Central:
        self.__dict__["plugins"] = with_targets(self, self.plugins)
        return self

    @model_validator(mode="after")
    def _pairs(self) -> Central:
        try:
            self.distillation.check_noisy([self.student.model])
        except ValueError as error:
            raise ValueError(f"distillation.{error}") from None
        return self

    @model_validator(mode="after")
    def _paired(self) -> Central:
        check_modalities(
            self.data.pairs,
            "data.pairs",
            dataset=None if self.data.dataset == Data().dataset else self.data.dataset,
            teachers=self.teachers.modality,
            student=self.student.modality,
        )
        if self.data.pairs and self.distillation.unlabelled:
            raise ValueError(
                "distillation.unlabelled: images beside the pairs have no other side; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _headed(self) -> Central:
        """Refuse heads that nobody teaches, and what takes an image to have one class."""
        dealt, losses = self.heads, self.distillation.losses
        check_heads(losses, self.student, "distillation.losses")
        if not dealt:
            return self
        data, teachers, options = self.data, self.teachers, self.distillation
        wrong: list[tuple[str, bool, str]] = [
            ("teachers.classes", teachers.classes is not None, "null"),
            ("teachers.noisy", teachers.noisy is not None, "null"),
            ("data.pairs", bool(data.pairs), "{}"),
            ("data.domains", data.domains is not None, "null"),
            ("distillation.noisy", options.noisy is not None, "null"),
            ("distillation.unlabelled", options.unlabelled > 0, "0"),
        ]
        for key, broken, wanted in wrong:
            if broken:
                raise ValueError(
                    f"{key}: must be {wanted} with student.heads: it takes an image to have one "
                    "class, and here it has one for each head"
                )
        return self

    @property
    def heads(self) -> tuple[str, ...]:
        """The head that each teacher knows; empty where the student has one alone."""
        return dealt_heads(self.student, self.teachers.heads, len(self.teachers.models))

    @property
    def crosses_modalities(self) -> bool:
        """Whether a teacher sees something else than the student."""
        return any((seen,) != self.student.modality for seen in self.teachers.modality)


_LOSSES = "distillation.losses"


def _method(name: str, value: Any) -> Any:
    """`kd`, `{name: kd, ...}` and a list of such stand for the losses alone."""
    if isinstance(value, str | list | tuple) or (isinstance(value, Mapping) and "name" in value):
        return {_LOSSES: value}
    for key in value if isinstance(value, Mapping) else ():
        if str(key).split(".")[0] in {"recipe", *Distillation.model_fields}:
            new = str(key).removeprefix("recipe").lstrip(".")
            raise ValueError(
                f"methods.{name}.{key}: a method changes keys of the experiment; write "
                f"distillation.{new or 'KEY'}"
            )
        if not str(key).startswith("distillation."):
            raise ValueError(
                f"methods.{name}: {key} is the same for all methods; a method changes distillation"
            )
    return value


class DistillConfig(StudyConfig):
    """Several methods, one after the other, with the same teachers, student and data.

    A method is its losses, or changes `{distillation.KEY: value}`.
    """

    moved: ClassVar[Mapping[str, str]] = {
        "recipe": "experiment.distillation (of students) and experiment.teachers",
        "teachers_per_seed": "experiment.teachers.per_seed",
        "assistants": "experiment.distillation.assistants",
        "guidance": "experiment.distillation.assistant_mode",
    }

    study: Literal["distill"] = "distill"
    name: Name = "distill"
    experiment: Central
    methods: dict[RowName, dict[str, Any]] = Field(
        default={}, description="name -> losses, or changes"
    )
    only: Only = None

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        # `crd: null` takes out what a base file has put in.
        return {name: _method(name, given) for name, given in value.items() if given is not None}

    @model_validator(mode="after")
    def _only_what_there_is(self) -> DistillConfig:
        check_only(self.only, [BASELINE, *self.methods])
        return self

    def runs(self) -> dict[str, Central]:
        """Name -> what is run, in order: the student alone, then those chosen.

        Raises `ConfigError` for what does not exist.
        """
        heads = self.experiment.student.heads
        alone = {
            _LOSSES: [{"name": "ce", "head": head} for head in heads] or [{"name": "ce"}],
            "distillation.assistants": [],
            "distillation.generations": 1,
            "distillation.unlabelled": 0,
        }
        everything = {BASELINE: alone, **self.methods}
        return {
            name: changed(self.experiment, changes, f"methods.{name}")
            for name, changes in everything.items()
            if self.only is None or name in (*self.only, BASELINE)
        }
