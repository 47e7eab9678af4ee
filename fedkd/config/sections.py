"""The sections of an experiment, with their defaults and what they allow."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fedkd.config.messages import one_line
from fedkd.io.text import from_ranges, nearest
from fedkd.registry import is_target, target_name
from fedkd.training.noisy import options as noisy


class ConfigError(ValueError):
    """What the user wrote cannot be run; the message is one line, ready to print."""


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _OneLine
else:

    class _OneLine(type(BaseModel)):
        """Sections made in Python are refused in one line, as those that are read from a file."""

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise ConfigError(one_line(cls, error)) from None


class Section(BaseModel, metaclass=_OneLine):
    """Base of all sections: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_yaml(self) -> str:
        """The resolved config, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def left_open(self) -> tuple[str, ...]:
        """Dotted keys that nobody has set and whose default follows from other keys."""
        return ()

    def to_json(self) -> str:
        """Compact and canonical: what differs from the defaults."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def to_bytes(self) -> bytes:
        """What travels to the clients: `to_json`, compressed, after a hash of all values.

        Versions with other defaults would mean something else by the same differences.
        """
        return bytes.fromhex(self.hash[:16]) + zlib.compress(self.to_json().encode(), 9)

    @property
    def hash(self) -> str:
        """SHA-256 of all values, in hexadecimal digits."""
        # Sorted, since the order of a component's options is lost on the way.
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Component(BaseModel):
    """A registered thing and its options; its name alone will do.

    `target: package.function`, of a model, is `name: package:function`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "target" in value and "name" not in value:
            rest = {key: given for key, given in value.items() if key != "target"}
            return {"name": target_name(value["target"]), **rest}
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> Mapping[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


def with_targets(config: Section, plugins: tuple[str, ...]) -> tuple[str, ...]:
    """Plugins, and the functions that make models: code that a config has chosen, as they are."""
    return tuple(dict.fromkeys([*plugins, *filter(is_target, _names(config))]))


def _names(value: object) -> Iterator[str]:
    if isinstance(value, Component):
        yield value.name
    elif isinstance(value, Section):
        for _, part in value:
            yield from _names(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from _names(part)


# One component may stand where several may.
_Listed = BeforeValidator(lambda value: [value] if isinstance(value, str | Mapping) else value)
NamedList = Annotated[tuple[Component, ...], _Listed]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


# What an optimiser is used with where nothing is given: learning rate, weight decay.
_RATES = {"sgd": (0.05, 5e-4), "adam": (0.003, 0.0), "adamw": (0.003, 0.01)}


def _rate(place: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda values: _RATES[values.get("name", "adamw")][place]


class Optimizer(Section):
    """How a network is trained: the optimiser and its learning-rate schedule; its name will do.

    Learning rate and weight decay follow the name where they are not given.
    """

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(default_factory=_rate(0), gt=0)
    momentum: Fraction = Field(default=0.9, description="SGD only")
    weight_decay: float = Field(default_factory=_rate(1), ge=0)
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[Fraction, ...] = Field(
        default=(0.625, 0.75, 0.875),
        description="`step`: shares of the training after which lr drops",
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="`step`: factor of each drop")
    warmup: Fraction = Field(
        default=0.0, description="share of the steps in which lr rises linearly"
    )
    max_grad_norm: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> Optimizer:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov: needs name sgd and a momentum above 0, got {self.name} and "
                f"{self.momentum:g}; set nesterov=false"
            )
        return self


class Side(Section):
    """What one modality shows of each sample; given as a data set alone, that is `dataset`."""

    dataset: Component
    partition: Component | None = Field(
        default=None, description="deals its private images; default: data.partition"
    )


_Side = Annotated[
    Side,
    BeforeValidator(
        lambda v: (
            {"dataset": v}
            if isinstance(v, str) or (isinstance(v, Mapping) and "dataset" not in v)
            else v
        )
    ),
]
Modality = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Modalities = Annotated[
    tuple[Modality, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)
]


class Transfer(Section):
    """The common transfer set about which knowledge is shared."""

    size: Positive = 1000
    labelled: bool = False
    dataset: Component | None = Field(
        default=None, description="another data set; default: the same one"
    )
    pairs: dict[Modality, _Side] = Field(
        default={},
        description="modality -> data set: samples are pairs, of which each client sees one side",
    )
    by: Literal["class", "index"] = Field(
        default="class", description="`pairs`: at random within a class, or the same places"
    )


class Views(Section):
    """Virtual views of the transfer set; every machine makes the same ones."""

    strength: Literal["weak", "moderate", "strong"] = "moderate"
    flip: bool = False
    refresh: bool = Field(default=True, description="new virtual views in every round")


class LabelNoise(Section):
    """Wrong labels among those that networks are trained on; see `fedkd.data.label_noise`."""

    kind: Literal["symmetric", "asymmetric", "pair", "instance", "file"]
    rate: float | None = Field(default=None, description="share of the labels that are drawn")
    file: str | None = Field(
        default=None, description="`file`: labels of all training images, below data.root"
    )
    key: str | None = Field(default=None, description="`file`: the array's name in an .npz")
    clients: float = Field(default=1.0, description="share of the clients that have it")


class Domains(Section):
    """Domains of the private images, and the target; see `fedkd.data.domains`."""

    sources: NamedList = Field(min_length=1, description="shifts, dealt to clients in turn")
    target: Component = Field(description="shift of the transfer set and the test set")


class Data(Section):
    """Where the images come from and who holds them."""

    dataset: Component = Field(
        default=Component(name="digits"), description="not read where there are transfer.pairs"
    )
    root: str | None = Field(default=None, description="folder of local data; default: FEDKD_DATA")
    public: str | None = Field(
        default=None, description="file below root with the public images; clients bring their own"
    )
    partition: Component = Component(name="dirichlet", alpha=0.3)  # type: ignore[call-arg]
    private: Positive | None = Field(
        default=None, description="images over all clients; default: the rest"
    )
    holdout: float = Field(
        default=0.1, ge=0, lt=1, description="share each client keeps for validation"
    )
    label_noise: LabelNoise | None = Field(
        default=None, description="wrong labels among the private training images"
    )
    domains: Domains | None = Field(
        default=None, description="domains of the clients' images and of all others"
    )
    validation: int = Field(default=0, ge=0, description="labelled images held by the server")
    test: Positive | None = Field(default=None, description="test images used; default: all")
    transfer: Transfer = Transfer()
    views: Views = Views()


class Feedback(Section):
    """What the clients get back from the server's student.

    `init`: its weights, where the network is the same. `regulariser`: teachers are held to its
    predictions on their private images. `align`: before they train, teachers learn its predictions
    on the transfer set (FedMD's digest).
    """

    use: Literal["none", "init", "regulariser", "align"] = "none"
    weight: float = Field(default=1.0, ge=0, description="`regulariser`")
    temperature: float = Field(default=2.0, gt=0)
    epochs: Positive = Field(default=1, description="`align`: passes over the transfer set")


class Privacy(Section):
    """What is promised about the clients' images, and how it is kept; all of it is public.

    `dp_sgd` protects single examples against everybody, the server included. `label_dp` protects
    labels only: each is drawn anew once, and may be a lie.
    """

    mechanism: Literal["dp_sgd", "label_dp"] = "dp_sgd"
    epsilon: float | None = Field(default=None, gt=0, description="of the whole run, per client")
    noise_multiplier: float | None = Field(
        default=None, gt=0, description="instead of epsilon, or to overrule its calibration"
    )
    delta: float | None = Field(
        default=None, gt=0, lt=1, description="default: at most 0.1 / nominal_size"
    )
    nominal_size: Positive | None = Field(
        default=None, description="public size of a shard, from which rates and steps follow"
    )
    max_grad_norm: float = Field(default=1.0, gt=0)
    clipping: Literal["hooks", "ghost"] = "hooks"
    accountant: Literal["rdp", "prv"] = "prv"

    @model_validator(mode="after")
    def _complete(self) -> Privacy:
        if self.mechanism == "label_dp":
            if self.epsilon is None or self.noise_multiplier is not None:
                raise ValueError("mechanism 'label_dp' needs epsilon and nothing else")
            return self
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("mechanism 'dp_sgd' needs epsilon or noise_multiplier")
        if self.nominal_size is None:
            raise ValueError(
                "mechanism 'dp_sgd' needs nominal_size: the true size of a shard is private"
            )
        return self


class Partner(Section):
    """The second network of a training on noisy labels; its model's name alone will do.

    It is to differ from the first, and better know something before it sees a label: by a file of
    weights (the model's option), or by contrasts of unlabelled images.
    """

    model: Component | None = Field(default=None, description="default: the first network's")
    pretraining: Literal["none", "transfer", "own"] = Field(
        default="none", description="on whose images, without labels: the common ones, its own"
    )
    epochs: Positive = Field(default=20, description="of the pretraining")


_Partner = Annotated[
    Partner,
    BeforeValidator(
        lambda v: (
            {"model": v} if isinstance(v, str) or (isinstance(v, Mapping) and "name" in v) else v
        )
    ),
]


class Unlearn(Section):
    """When mistakes are undone, and which; epochs count from 0 over the whole training."""

    start: int = Field(default=50, ge=0, description="epoch after which mistakes are undone")
    period: Positive = Field(
        default=10, description="epochs between selections, and over which losses are compared"
    )
    length: Positive = Field(default=4, description="epochs of unlearning after a selection")
    current: Fraction = Field(default=0.05, description="share selected for its low loss")
    drop: Fraction = Field(default=0.20, description="share selected for the fall of its loss")
    temperature: float = Field(default=0.05, gt=0, description="softness of what is unlearnt")
    batch_size: Annotated[int, Field(ge=2)] = 512


class Mix(Section):
    """How labelled and unlabelled images are learnt together."""

    beta: float = Field(default=4.0, gt=0, description="of the draw of a mixture's shares")
    sharpen: float = Field(default=0.5, gt=0, description="temperature of targets")
    weight: float = Field(default=25.0, ge=0, description="of the unlabelled part, at its height")
    ramp: float = Field(default=16.0, gt=0, description="epochs in which it rises")


class Noisy(Section):
    """How a network learns from labels of which some are wrong.

    Epochs count from 0 over the whole training, in a run over all its rounds.
    """

    method: noisy.Method = "acdu"
    partner: _Partner = Partner()
    warmup: Positive = Field(
        default=10, description="epochs before labels are judged; 30 for 100 classes"
    )
    penalty: bool = Field(
        default=False,
        description="warm-up with less certain predictions, for labels confused in pairs",
    )
    encoder_from: int = Field(
        default=50, ge=0, description="epoch from which a pretrained partner's encoder learns"
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="chance of being clean")
    average: Positive = Field(default=1, description="epochs whose losses are averaged")
    neighbours: int = Field(
        default=15, ge=0, description="of an image, that vote for its reference label; 0: none"
    )
    trust: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="share of labels that neighbours confirm above which all count as clean; "
        "1: never",
    )
    guess_in: Literal["eval", "train"] = "eval"
    answer: Literal["sum", "a", "weighted"] = Field(
        default="sum", description="logits of both, of the first alone, or weighted by agreement"
    )
    unlearn: Unlearn = Unlearn()
    mix: Mix = Mix()

    @model_validator(mode="after")
    def _possible(self) -> Noisy:
        if self.method == "acdu" and self.partner.model is None:
            raise ValueError(
                "partner.model: 'acdu' pairs two different networks; name the second, "
                "e.g. partner=mlp, or take method=divide"
            )
        if self.method == "gmm" and self.partner != Partner():
            raise ValueError("partner: 'gmm' trains one network; leave the partner out")
        if self.method != "acdu" and self.partner.pretraining != "none":
            raise ValueError(
                f"partner.pretraining: {self.method!r} begins from scratch; set it to none, or "
                "take method=acdu"
            )
        return self

    def options(self, prior: float | None = None) -> noisy.Noisy:
        """What the training is given; `prior` is the share of clean labels where it is known."""
        values = self.model_dump(exclude={"partner", "unlearn", "mix"})
        return noisy.Noisy(
            **values,
            prior=prior,
            unlearn=noisy.Unlearn(**self.unlearn.model_dump()),
            mix=noisy.Mix(**self.mix.model_dump()),
        )

    @property
    def knows(self) -> bool:
        """Whether the partner is pretrained."""
        model = self.partner.model
        weights = model is not None and model.options.get("weights") is not None
        return self.method == "acdu" and (weights or self.partner.pretraining != "none")

    def check(self, model: Component, epochs: int, said: str) -> None:
        """Refuse what never happens in so many epochs. Raises `ValueError`."""
        self.options().check(epochs, said)
        if self.method == "acdu" and not self.knows and self.partner.model == model:
            raise ValueError(
                f"partner.model: {model.name!r} beside {model.name!r}, both untrained, is no pair "
                "of different networks; name another, or take method=divide"
            )


HeadName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
HeadNames = Annotated[
    tuple[HeadName, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)
]
Known = tuple[tuple[int | str, ...], ...] | None
"""Of each teacher, the classes that it knows; None: all know all."""


class Teachers(Section):
    """The clients' private networks and their local training."""

    models: NamedList = Field(default=(Component(name="cnn_small"),), min_length=1)
    epochs: Positive = 10
    batch_size: Positive = 16
    optimizer: Optimizer = Optimizer()
    augment: str = "none"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    warm_start: bool = Field(default=True, description="go on from the last round's weights")
    feedback: Feedback = Feedback()
    privacy: Privacy | None = None
    noisy: Noisy | None = Field(
        default=None, description="how they learn from labels of which some are wrong"
    )
    modality: str | dict[str, str] | None = Field(
        default=None, description="what clients see, of data.transfer.pairs: one, or by clients"
    )
    classes: Known = Field(
        default=None,
        description="of each client, the classes that it knows, by name or number; default: all",
    )
    server: NamedList = Field(
        default=(), description="networks that the server has from files, and nobody trains"
    )
    heads: HeadNames = Field(
        default=(), description="the one of student.heads that each knows, dealt in turn; all"
    )

    @field_validator("modality", mode="before")
    @classmethod
    def _by_clients(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

    def model_of(self, client: int) -> Component:
        """Models are dealt to clients in turn."""
        return self.models[client % len(self.models)]


def _named(value: Any) -> Any:
    """Names of classes may be numbers. Raises `ValueError` for what YAML takes for truth values."""
    if not isinstance(value, Mapping):
        return value
    if any(isinstance(name, bool) for name in value):
        raise ValueError(
            "YAML reads yes, no, on and off as true and false: put these names of classes in quotes"
        )
    return {str(name): members for name, members in value.items()}


_Task = Annotated[
    Literal["classes", "column"] | dict[str, tuple[int | str, ...]], BeforeValidator(_named)
]


class Student(Section):
    """The one network that comes out; the name of its model will do."""

    model: Component = Component(name="cnn_small")
    modality: Modalities = Field(
        default=(), description="what it sees, of data.transfer.pairs: one, or several together"
    )
    heads: dict[HeadName, _Task] = Field(
        default={},
        description="task -> `classes` of the data set, `column` of labels of this name, or "
        "names of its own -> classes of the data set",
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Term(Component):
    """One loss of the objective with its weight and when it counts; epochs count from 1."""

    weight: float = Field(default=1.0, ge=0)
    warmup: int = Field(
        default=0, ge=0, description="epochs over which the weight rises linearly to full"
    )
    start: Positive = Field(default=1, description="first epoch in which it counts")
    stop: Positive | None = Field(default=None, description="last epoch in which it counts")
    decay_from: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="epoch after which the weight falls to zero along a cosine"
    )
    head: HeadName | None = Field(default=None, description="the one of student.heads it is about")


Terms = Annotated[tuple[Term, ...], Field(min_length=1), _Listed]


# Measured on several skews and data sets: docs/compare.md. The winners of fused labels teach best;
# the soft terms stay light.
_LOSSES = (
    Term(name="ce"),
    Term(name="dkd", alpha=1.0, beta=0.5, temperature=1.0),  # type: ignore[call-arg]
    Term(name="vrm", weight=0.5),
)


class Distillation(Section):
    """How the student learns from the fused teachers."""

    losses: Terms = _LOSSES
    epochs: Positive = 30
    batch_size: Positive = 32
    optimizer: Optimizer = Optimizer()
    augment: str = Field(default="none", description="recipe of the images the student sees")
    warm_start: bool = Field(default=True, description="the student goes on from the last round")
    assistants: NamedList = Field(
        default=(), description="networks trained in between on the server, large to small"
    )
    assistant_mode: Literal["takd", "dgkd"] = Field(
        default="dgkd", description="learn from the next larger network (TAKD), or from all (DGKD)"
    )


class Quarantine(Section):
    """When a client is left out for the rest of the run."""

    after: Positive | None = Field(
        default=None, description="refused payloads, or rounds without trust; null: never"
    )
    trust: Fraction = Field(
        default=0.001, description="mean weight, in equal says, below which a round is one without"
    )


def _ask(value: Any) -> Any:
    share = isinstance(value, float) and 0 < value <= 1
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value != "all" and not share and not count:
        raise ValueError(f"expected all, a share like 0.4 or a count like 8, got {value!r}")
    return value


class Participation(Section):
    """Who is asked in a round; given as a number alone, that is `ask`."""

    ask: Annotated[int | float | str, BeforeValidator(_ask)] = Field(
        default="all", description="clients asked in a round: all, a share (0.4) or a count (8)"
    )
    sampler: Component = Field(
        default=Component(name="uniform"), description="how they are drawn, from the run's seed"
    )
    minimum: Positive = Field(
        default=1, description="clients that a round needs, to be there and to answer"
    )
    start: Positive | None = Field(
        default=None,
        description="clients that a run needs to start; others may come and go. null: all of them",
    )
    spare: Fraction = Field(
        default=0.0, description="share asked beside them; the round takes the first that trained"
    )


_Participation = Annotated[
    Participation,
    BeforeValidator(lambda v: {"ask": v} if isinstance(v, int | float | str) else v),
]


class Stale(Section):
    """How long answers count that are not of this round."""

    keep: int = Field(
        default=0,
        ge=0,
        description="rounds for which the last answers of a client that was away count; 0: none",
    )
    decay: float = Field(
        default=0.9, gt=0, le=1, description="factor of an answer's weight for each round of age"
    )


class Federation(Section):
    """How the round is run."""

    participation: _Participation = Participation()
    mode: Literal["synchronous", "buffered"] = Field(
        default="synchronous", description="buffered: late answers count in the next round"
    )
    buffer: Positive | None = Field(
        default=None, description="`buffered`: replies that end a round; null: those of all asked"
    )
    quorum: Fraction = Field(
        default=0.5, description="share of the asked clients whose knowledge a round needs"
    )
    deadline: float = Field(default=600.0, gt=0, description="seconds a client has per phase")
    wait: float = Field(
        default=0.0, ge=0, description="seconds to wait at the start for clients still absent"
    )
    max_abs_logit: float = Field(default=1e4, gt=0, description="larger values are refused")
    max_payload_mb: float = Field(default=256.0, gt=0, description="larger replies are refused")
    codec: Component = Field(
        default=Component(name="float16"), description="how knowledge is written for the wire"
    )
    subset: float = Field(
        default=1.0, gt=0, le=1, description="share of the transfer set asked about after round 1"
    )
    stale: Stale = Stale()
    quarantine: Quarantine = Quarantine()


Switch = Annotated[
    Literal["auto", "on", "off"],
    # YAML reads `on` and `off` as booleans.
    BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value),
]


class Evaluation(Section):
    """What is measured, on the public test set unless another is named."""

    teachers: bool = Field(default=True, description="teachers answer the test images too")
    clients: bool = Field(
        default=True, description="the student on each client's held-out part, at the end"
    )
    baselines: tuple[Literal["oracle", "ceiling"], ...] = ("oracle", "ceiling")
    detection: Switch = Field(
        default="auto",
        description="balanced accuracy, AUC and sensitivity: auto (where the test set has twice as "
        "many images of one class as of another), on, off",
    )
    best: bool = Field(
        default=False,
        description="keep the student of the round that is best on `data.validation`, not the last",
    )
    patience: Positive | None = Field(
        default=None, description="end after so many rounds without a better one; needs best=true"
    )


class Energy(Section):
    """What a report says of energy where this machine does not count it."""

    watts: float | None = Field(
        default=None, gt=0, description="draw of the machine; joules are then marked as assumed"
    )
    grams_per_kwh: float | None = Field(
        default=None, ge=0, description="CO2 equivalents of your electricity; null: none are shown"
    )


class Resources(Section):
    """Compute. Thread counts are part of the config: results on CPU depend on them bit-wise."""

    client_cpus: Positive = 1
    client_gpus: float = Field(default=0.0, ge=0)
    batch_clients: Switch = Field(
        default="auto",
        description="train simulated clients of one architecture together: auto (on GPUs), on, off",
    )
    ray_address: str | None = Field(
        default=None, description="Ray cluster to join: auto, HOST:PORT; default: this machine"
    )
    total_cpus: Positive | None = Field(
        default=None,
        description="CPUs for all clients at once; default: those that this process may use",
    )
    teachers_gb: float = Field(
        default=20.0,
        gt=0,
        description="disk for the teachers of simulated clients; those asked longest ago make room",
    )
    server_threads: Positive = Field(default=1, description="more helps networks from ResNet-20 up")
    device: str = Field(default="auto", description="server's device: auto, cpu, cuda, cuda:1")
    graphs: Switch = Field(
        default="auto", description="capture training steps as CUDA graphs: auto (on GPUs), on, off"
    )
    deterministic: bool = Field(
        default=False, description="the same seed gives the same student on a GPU too; slower"
    )
    energy: Energy = Energy()

    @model_validator(mode="after")
    def _here(self) -> Resources:
        if self.total_cpus is not None and self.ray_address is not None:
            raise ValueError(
                "total_cpus: bounds this machine, and ray_address names a cluster that has its own "
                "CPUs; bound those where it is started: ray start --num-cpus"
            )
        if self.total_cpus is not None and self.total_cpus < self.client_cpus:
            raise ValueError(
                f"total_cpus: {self.total_cpus} are fewer than one client's client_cpus, "
                f"{self.client_cpus}"
            )
        return self

    @property
    def clients_together(self) -> bool:
        """Whether simulated clients of one architecture are trained together."""
        if self.batch_clients == "auto":
            return self.client_gpus > 0
        return self.batch_clients == "on"


# The most clients of an open range: numbers that nobody uses cost next to nothing.
_OPEN = 10_000


def _bounds(value: Any) -> tuple[Any, Any]:
    """The ends of a range of clients: `2 to 5`, `{min: 2, max: 5}`, or open, `2 or more`."""
    if isinstance(value, Mapping) and {"min"} <= set(value) <= {"min", "max"}:
        return value["min"], value.get("max", _OPEN)
    pattern = r"\s*(\d+)\s*(?:to\s*(\d+)|or\s+more)\s*"
    found = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(
            f"clients: expected a number, or a range like '2 to 5', '2 or more' or "
            f"{{min: 2, max: 5}}, got {value!r}"
        )
    return int(found[1]), int(found[2] or _OPEN)


# Keys whose default follows from what is promised and from who has the images.
_DEPENDENT = (
    "fusion",
    "distillation.losses",
    "evaluation.teachers",
    "evaluation.clients",
    "evaluation.baselines",
)


def check_modalities(
    pairs: Collection[str],
    key: str,
    *,
    dataset: Component | None,
    teachers: Collection[str],
    student: tuple[str, ...],
) -> None:
    """Refuse modalities that nobody shows, or nobody sees. Raises `ValueError`.

    Args:
        pairs: The modalities that there are.
        key: Where they are named.
        dataset: What is named as the one data set; None: nothing.
        teachers: What teachers see.
        student: What the student sees.
    """
    if not pairs:
        for name, value in (("teachers", teachers), ("student", student)):
            if value:
                raise ValueError(f"{name}.modality: needs {key}, which show modalities")
        return
    known = ", ".join(pairs)
    if len(pairs) < 2:
        raise ValueError(f"{key}: expected two modalities or more, got {known}")
    if dataset is not None:
        raise ValueError(
            f"data.dataset: {dataset.name!r} is not read, since {key} name the data set of each "
            "modality; leave it out"
        )
    if not teachers:
        raise ValueError(
            f"teachers.modality: say which of {key} ({known}) the teachers see: one, or each its "
            "own"
        )
    if not student:
        raise ValueError(f"student.modality: say which of {key} ({known}) the student sees")
    if len(set(student)) < len(student):
        raise ValueError(f"student.modality: {', '.join(student)}: one is named twice")
    for who, names in (("teachers", teachers), ("student", student)):
        for name in names:
            if name not in pairs:
                raise ValueError(f"{who}.modality: {name!r} is none of {key} ({known})")


def dealt_heads(student: Student, given: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The head of each of `count` teachers, dealt in turn; empty where the student has none.

    Raises:
        ValueError: one that does not exist, or that nobody teaches.
    """
    heads = tuple(student.heads)
    if given and not heads:
        raise ValueError("teachers.heads: needs student.heads, which say what the heads are")
    for name in given:
        if name not in heads:
            raise ValueError(
                f"teachers.heads: there is no head {name!r} (student.heads: {', '.join(heads)})"
                f"{nearest(name, heads)}"
            )
    dealt = given or heads
    found = tuple(dealt[number % len(dealt)] for number in range(count)) if heads else ()
    for name in heads:
        if name not in found:
            raise ValueError(
                f"student.heads.{name}: none of {count} teachers knows its classes; name it in "
                "teachers.heads, take more teachers, or leave the head out"
            )
    return found


def one_head(student: Student, who: str, where: str = "student.heads") -> None:
    """Refuse what takes an image to have one class. Raises `ConfigError`."""
    if student.heads:
        raise ConfigError(
            f"{where}: {who} takes an image to have one class, this student gives "
            f"{len(student.heads)} answers ({', '.join(student.heads)}): leave the heads out"
        )


def check_heads(terms: tuple[Term, ...], student: Student, where: str) -> None:
    """Refuse terms about heads that there are not. Raises `ValueError`."""
    for number, term in enumerate(terms):
        if term.head is not None and term.head not in student.heads:
            names = ", ".join(student.heads) or "none"
            raise ValueError(
                f"{where}.{number}.head: there is no head {term.head!r} (student.heads: {names})"
                f"{nearest(term.head, list(student.heads))}"
            )


class Experiment(Section):
    """Everything one run needs.

    An empty one is the recipe that was measured (docs/compare.md). Where a promise is made, keys
    left open become what the promise allows (docs/running.md#defaults).
    """

    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    rounds: Positive = 3
    clients: Positive = 8
    plugins: tuple[str, ...] = Field(
        default=(), description="modules to import: they register themselves"
    )
    output: str = Field(default="runs", description="folder for run directories")
    track: NamedList = Field(
        default=(), description="trackers that hear of the run: tensorboard, wandb, mlflow"
    )
    data: Data = Data()
    teachers: Teachers = Teachers()
    student: Student = Student()
    fusion: NamedList = (Component(name="density_ratio"),)
    release: Annotated[
        Component | None,
        Field(description="mechanism between the fused teachers and the student; default: none"),
    ] = None
    distillation: Distillation = Distillation()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _range(cls, values: Any) -> Any:
        """`clients: 2 to 5` is short for `clients: 5` and `federation.participation.start: 2`."""
        given = values.get("clients") if isinstance(values, Mapping) else None
        if not isinstance(given, str | Mapping) or str(given).isdecimal():
            return values
        least, most = _bounds(given)
        federation = values.get("federation", {})
        if not isinstance(federation, Mapping | Section):
            return {**values, "clients": most}  # refused there
        asked = dict(federation).get("participation", {})
        asked = dict(asked) if isinstance(asked, Mapping | Section) else {"ask": asked}
        federation = {**dict(federation), "participation": {**asked, "start": least}}
        return {**values, "clients": most, "federation": federation}

    @model_validator(mode="after")
    def _targets(self) -> Experiment:
        self.__dict__["plugins"] = with_targets(self, self.plugins)
        return self

    @model_validator(mode="after")
    def _settle(self) -> Experiment:
        """Give each key that was left open the default that goes with the others."""
        for key, value in self._dependent().items():
            name, _, last = key.rpartition(".")
            if key in self.left_open():
                # Past pydantic: a key settled here still counts as one that nobody has set. The
                # section is a copy, since that of the class's defaults is shared.
                section = getattr(self, name).model_copy() if name else self
                section.__dict__[last] = value
                if name:
                    self.__dict__[name] = section
        return self

    @model_validator(mode="after")
    def _paired(self) -> Experiment:
        """Refuse modalities that nobody shows, or nobody sees."""
        pairs, given = self.data.transfer.pairs, self.teachers.modality
        own = self.data.transfer.dataset
        if pairs and own is not None and own.name != "npz":
            raise ValueError(
                f"data.transfer.dataset: pairs of their own are read from npz files with "
                f"{', '.join(f'x_{name}' for name in pairs)}, got {own.name!r}"
            )
        check_modalities(
            pairs,
            "data.transfer.pairs",
            dataset=None if self.data.dataset == Data().dataset else self.data.dataset,
            teachers=self._seen_by() if pairs and given else given or (),
            student=self.student.modality,
        )
        if pairs:
            self._crossed()
        return self

    def _seen_by(self) -> tuple[str, ...]:
        """Each client's modality. Raises `ValueError` if that is not clear."""
        given = self.teachers.modality
        if not isinstance(given, dict):
            return (given or "",) * self.clients
        seen: dict[int, str] = {}
        for span, name in given.items():
            try:
                clients = from_ranges(span.replace(" ", ""))
            except ValueError:
                raise ValueError(
                    f"teachers.modality: expected clients like 0-2 or 3,5, got {span!r}"
                ) from None
            for client in clients:
                if client in seen:
                    raise ValueError(f"teachers.modality: client {client} is named twice")
                if client >= self.clients:
                    raise ValueError(
                        f"teachers.modality: there is no client {client}: clients are 0 to "
                        f"{self.clients - 1}"
                    )
                seen[client] = name
        for client in range(self.clients):
            if client not in seen:
                raise ValueError(f"teachers.modality: client {client} sees nothing")
        return tuple(seen[client] for client in range(self.clients))

    def _crossed(self) -> None:
        """Refuse what needs teachers and student to see the same."""
        feedback = self.teachers.feedback.use
        if feedback != "none" and self.crosses_modalities:
            raise ValueError(
                f"teachers.feedback.use: {feedback!r} shows clients' images to the student, or "
                "gives them its weights; it sees another modality: set it to none"
            )
        if "ceiling" in self.evaluation.baselines and "ceiling" in self._impossible_baselines():
            raise ValueError(
                "evaluation.baselines: 'ceiling' trains the student on all private images, of "
                f"which nobody has any that it sees ({' and '.join(self.student.modality)}); set "
                "evaluation.baselines=[oracle]"
            )

    def _impossible_baselines(self) -> tuple[str, ...]:
        student = self.student.modality
        alone = len(student) == 1 and student[0] in self.modalities
        return () if alone or not student else ("ceiling",)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Each client's modality; empty where all see the one data set."""
        return self._seen_by() if self.data.transfer.pairs else ()

    @property
    def crosses_modalities(self) -> bool:
        """Whether a teacher sees something else than the student."""
        return any((seen,) != self.student.modality for seen in self.modalities)

    @model_validator(mode="after")
    def _possible(self) -> Experiment:
        if self.teachers.feedback.use == "init" and self.student.model not in self.teachers.models:
            raise ValueError(
                f"teachers.feedback.use: 'init' needs a teacher of the student's model "
                f"{self.student.model.name!r} (teachers.models: "
                f"{', '.join(m.name for m in self.teachers.models)})"
            )
        self._specialised()
        self._headed()
        if self.federation.buffer is not None and self.federation.mode != "buffered":
            raise ValueError("federation.buffer: needs federation.mode=buffered")
        if self.federation.mode == "buffered" and self.federation.stale.keep == 0:
            raise ValueError(
                "federation.mode: 'buffered' lets late answers count by their age: set how many "
                "rounds they count, for example federation.stale.keep=2"
            )
        participation = self.federation.participation
        if (self.federation.buffer or participation.minimum) < participation.minimum:
            raise ValueError(
                f"federation.buffer: a round that ends with {self.federation.buffer} replies never "
                f"has federation.participation.minimum={participation.minimum}: raise one or "
                "lower the other"
            )
        for key in ("minimum", "start"):
            if (getattr(participation, key) or 0) > self.clients:
                raise ValueError(
                    f"federation.participation.{key}: {getattr(participation, key)} are more than "
                    f"clients={self.clients}"
                )
        if self.evaluation.patience is not None and not self.evaluation.best:
            raise ValueError(
                "evaluation.patience: a run that ends early keeps its best student: set "
                "evaluation.best=true"
            )
        if self.evaluation.best and self.data.validation == 0:
            raise ValueError(
                "evaluation.best: the round is chosen on labelled images that the server holds and "
                "nobody learns from: set data.validation to their number, for example 200"
            )
        if self.release is not None:
            self._releasable(self.release.name)
        if self.teachers.noisy is not None:
            self._learnable(self.teachers.noisy)
        if self.data.domains is not None and self.data.transfer.pairs:
            raise ValueError(
                "data.domains: shifts images of one modality; data.transfer.pairs has several: "
                "leave one of them out"
            )
        for key, what in (("label_noise", "labels"), ("domains", "images")):
            if self.data.public is not None and getattr(self.data, key) is not None:
                raise ValueError(
                    f"data.{key}: changes the {what} that are dealt; with data.public clients "
                    "bring their own: leave it out"
                )
        if self.data.public is not None and "ceiling" in self.evaluation.baselines:
            raise ValueError(
                "evaluation.baselines: 'ceiling' trains on all private images, which "
                "data.public leaves with the clients; set evaluation.baselines=[oracle]"
            )
        return self

    def _specialised(self) -> None:
        """Refuse what takes every teacher to know every class, where they know a part each."""
        known, privacy = self.teachers.classes, self.teachers.privacy
        if known is None and not self.heads:
            return
        part = "student.heads" if known is None else "teachers.classes"
        if known is not None and len(known) != self.clients:
            raise ValueError(
                f"teachers.classes: expected those of {self.clients} clients, got {len(known)}"
            )
        feedback = self.teachers.feedback.use
        wrong: list[tuple[str, bool, str]] = [
            ("teachers.feedback.use", feedback != "none", "none"),
            ("teachers.privacy.mechanism", privacy is not None
             and privacy.mechanism == "label_dp", "dp_sgd"),
            ("teachers.noisy", self.teachers.noisy is not None, "null"),
            ("release", self.release is not None, "null"),
        ]  # fmt: skip
        for key, broken, wanted in wrong:
            if broken:
                raise ValueError(
                    f"{key}: must be {wanted} with {part}: it takes every teacher to "
                    "know every class"
                )

    def _headed(self) -> None:
        """Refuse what takes an image to have one class, where the student has several heads."""
        losses = self.distillation.losses
        check_heads(losses, self.student, "distillation.losses")
        if not self.heads:
            return
        for name in self.student.heads:
            if name not in {term.head for term in losses}:
                raise ValueError(
                    f"student.heads.{name}: no loss teaches it; name it in one, for example "
                    f"distillation.losses=[{{name: ce, head: {name}}}, ...], or leave it out"
                )
        evaluation, data = self.evaluation, self.data
        wrong: list[tuple[str, bool, str]] = [
            ("teachers.classes", self.teachers.classes is not None, "null"),
            ("teachers.server", bool(self.teachers.server), "[]"),
            ("data.transfer.pairs", bool(data.transfer.pairs), "{}"),
            ("data.domains", data.domains is not None, "null"),
            ("data.public", data.public is not None, "null"),
            ("data.validation", data.validation > 0, "0"),
            ("evaluation.baselines", bool(evaluation.baselines), "[]"),
            ("evaluation.detection", evaluation.detection == "on", "auto"),
        ]
        for key, broken, wanted in wrong:
            if broken:
                raise ValueError(
                    f"{key}: must be {wanted} with student.heads: it takes an image to have one "
                    "class, and here it has one for each head"
                )

    @property
    def heads(self) -> tuple[str, ...]:
        """The head that each client's teacher knows; empty where the student has one alone."""
        return dealt_heads(self.student, self.teachers.heads, self.clients)

    def left_open(self) -> tuple[str, ...]:
        """Dotted keys that nobody has set and whose default follows from other keys."""
        return tuple(key for key in _DEPENDENT if not self._is_set(key))

    @property
    def settled(self) -> tuple[str, ...]:
        """Dotted keys left open that have another default here than in an empty config."""
        return tuple(key for key in self._dependent() if not self._is_set(key))

    def _is_set(self, key: str) -> bool:
        name, _, last = key.rpartition(".")
        return last in (getattr(self, name) if name else self).model_fields_set

    def _dependent(self) -> Mapping[str, Any]:
        """Defaults that differ from those of the class: what a promise refuses is no default.

        The losses: noisy answers are soft for no reason, their winners teach best
        (docs/privacy.md).
        """
        values: dict[str, Any] = {}
        if self._impossible_baselines():
            values["evaluation.baselines"] = ("oracle",)
        if self.crosses_modalities:
            values["distillation.losses"] = _LOSSES[:2]  # no virtual view is the same on both sides
        if self.teachers.server:  # the other default looks at private images
            values["fusion"] = (Component(name="uniform"),)
        if self.promises:
            values["fusion"] = (Component(name="uniform"),)
            values["distillation.losses"] = (Term(name="ce"),)
            values["evaluation.clients"] = False
        if self.release is not None:
            values["evaluation.teachers"] = False
        if self.promises or self.data.public is not None:
            values["evaluation.baselines"] = ("oracle",)
        if self.student.heads:
            values["evaluation.baselines"] = ()
        return values

    @property
    def promises(self) -> bool:
        """Whether something is promised about private images: facts about them then stay inside."""
        return self.teachers.privacy is not None or self.release is not None

    def _learnable(self, noisy: Noisy) -> None:
        """Refuse what does not go with a training on noisy labels."""
        teachers = self.teachers
        private = teachers.privacy is not None and teachers.privacy.mechanism == "dp_sgd"
        wrong: list[tuple[str, bool, str, str]] = [
            ("privacy.mechanism", private, "label_dp", "DP-SGD has no account for a split of the "
             "images by their losses"),
            ("feedback.use", teachers.feedback.use != "none", "none", "the student would change "
             "the networks whose losses are followed from epoch to epoch"),
            ("warm_start", not teachers.warm_start, "true", "losses are followed over all rounds"),
            ("label_smoothing", teachers.label_smoothing > 0, "0", "its targets are soft already"),
        ]  # fmt: skip
        for key, broken, wanted, why in wrong:
            if broken:
                raise ValueError(
                    f"teachers.{key}: must be {wanted} with teachers.noisy: {why}; or leave out "
                    "teachers.noisy"
                )
        epochs = self.rounds * teachers.epochs
        for model in teachers.models:
            try:
                noisy.check(
                    model, epochs, f"{self.rounds} rounds x {teachers.epochs} epochs = {epochs}"
                )
            except ValueError as error:
                raise ValueError(f"teachers.noisy.{error}") from None

    def _releasable(self, name: str) -> None:
        """Refuse what would let something out beside the mechanism."""
        wrong: list[tuple[str, bool, str]] = [
            ("fusion", [rule.name for rule in self.fusion] != ["uniform"], "[uniform]"),
            ("evaluation.teachers", self.evaluation.teachers, "false"),
            ("evaluation.clients", self.evaluation.clients, "false"),
            ("evaluation.baselines", "ceiling" in self.evaluation.baselines, "[oracle] or []"),
            ("teachers.server", bool(self.teachers.server), "[]"),
            ("teachers.feedback.use", self.teachers.feedback.use == "regulariser", "none"),
            ("federation.stale.keep", self.federation.stale.keep > 0, "0"),
        ]
        for key, broken, wanted in wrong:
            if broken:
                raise ValueError(
                    f"{key}: must be {wanted} with release {name!r}: everything else that is "
                    "computed from the teachers' answers would leave the server without noise"
                )
        if self.sums_securely:
            self._summable(name)

    @property
    def sums_securely(self) -> bool:
        """Whether the clients' votes leave them in a secure sum alone."""
        return self.release is not None and self.release.options.get("secure") is not None

    def _summable(self, name: str) -> None:
        """Refuse what looks at a single client's answers, or changes who is in a sum."""
        federation = self.federation
        wrong: list[tuple[str, bool, str, str]] = [
            ("mode", federation.mode == "buffered", "synchronous", "a sum is of one round"),
            ("participation.start", federation.participation.start is not None, "null", "the noise "
             "of each client follows from how many there are"),
            ("subset", federation.subset < 1, "1", "no answers of earlier rounds are held"),
            ("codec", federation.codec.name != "float16", "float16", "votes travel as whole "
             "numbers under masks"),
            ("quarantine.after", federation.quarantine.after is not None, "null", "nobody sees "
             "what a single client answers"),
        ]  # fmt: skip
        for key, broken, wanted, why in wrong:
            if broken:
                raise ValueError(
                    f"federation.{key}: must be {wanted} with release {name!r} and secure: {why}"
                )
