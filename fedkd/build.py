"""Config -> objects; the only room that knows both sides."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedkd.config import (
    Component,
    ConfigError,
    Experiment,
    Noisy,
    Student,
    Teachers,
    import_plugins,
)
from fedkd.config import Domains as DomainsSection
from fedkd.config import LabelNoise as LabelNoiseSection
from fedkd.config import Optimizer as OptimizerSection
from fedkd.config import Term as LossTerm
from fedkd.data import DATASETS, PARTITIONS, SHIFTS, views
from fedkd.data.cohorts import Sampler, how_many
from fedkd.data.datasets import ONE_WAY_ROUND, Sets, load_splits
from fedkd.data.domains import Domains, Shift
from fedkd.data.heads import Heads
from fedkd.data.label_noise import LabelNoise
from fedkd.data.local_shard import LocalShard, read_local_shard
from fedkd.data.pairs import Side, federate_pairs, read_pairs
from fedkd.data.splits import FederatedData, federate
from fedkd.distillation.objective import Objective, Term
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Fusion, check_partial
from fedkd.io.text import nearest
from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import Codec
from fedkd.knowledge.kinds import Logits, VirtualLogits
from fedkd.losses import LOSSES
from fedkd.models import MODELS
from fedkd.models.build import build_model, check_entry
from fedkd.models.entries import place_of
from fedkd.models.hub import HF
from fedkd.models.network import Network
from fedkd.privacy.release import RELEASES
from fedkd.privacy.release.base import Release
from fedkd.randomness import stream_seed
from fedkd.registry import Registry, is_target
from fedkd.training.noisy.pair import check_unlearning, paired, with_new_head
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import Passes

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


@dataclass(frozen=True)
class Parts:
    """What an experiment is made of, beside its data and networks."""

    objective: Objective
    fusion: list[Fusion]
    codec: Codec
    sampler: Sampler
    release: Release | None


def check(experiment: Experiment) -> Parts:
    """Build what needs no data and check the names of the rest, before anything is loaded.

    Raises:
        ConfigError: unknown name or option, named by its key in the config, or a missing plugin.
    """
    import_plugins(experiment.plugins)
    check_component(DATASETS, experiment.data.dataset, "data.dataset")
    for name, side in experiment.data.transfer.pairs.items():
        check_component(DATASETS, side.dataset, f"data.transfer.pairs.{name}.dataset")
        if side.partition is not None:
            check_component(PARTITIONS, side.partition, f"data.transfer.pairs.{name}.partition")
    if experiment.data.transfer.dataset is not None:
        check_component(DATASETS, experiment.data.transfer.dataset, "data.transfer.dataset")
    check_component(PARTITIONS, experiment.data.partition, "data.partition")
    if experiment.data.label_noise is not None:
        build_label_noise(experiment.data.label_noise, "data.label_noise")
    if experiment.data.domains is not None:
        build_domains(experiment.data.domains, "data.domains")
    for number, model in enumerate(experiment.teachers.models):
        check_model(model, f"teachers.models.{number}")
    check_noisy(experiment.teachers.noisy, "teachers.noisy")
    check_model(experiment.student.model, "student.model")
    for number, model in enumerate(experiment.distillation.assistants):
        check_model(model, f"distillation.assistants.{number}")
    fusion = [
        create(FUSIONS, rule, f"fusion.{number}") for number, rule in enumerate(experiment.fusion)
    ]
    codec = create(CODECS, experiment.federation.codec, "federation.codec")
    drawn = experiment.federation.participation.sampler
    with _named(drawn, "federation.participation.sampler"):
        sampler = Sampler.of(drawn.name, drawn.options)
    distillation = experiment.distillation
    objective = build_objective(
        distillation.losses, "distillation.losses", epochs=distillation.epochs
    )
    if experiment.crosses_modalities:
        check_across(objective, "distillation.losses")
    if experiment.teachers.classes is not None:
        with_parts(fusion, objective)
    if experiment.student.heads:
        with_heads(objective, "distillation.losses")
        with_parts(fusion, objective, "student.heads")
        if min(distillation.batch_size, experiment.data.transfer.size) == 1:
            raise ConfigError(
                "distillation.batch_size: a student with student.heads learns from batches of two "
                "images or more, got 1"
            )
    check_augmentation(experiment.teachers.augment, "teachers.augment")
    check_augmentation(distillation.augment, "distillation.augment")
    device_of(experiment)
    return Parts(objective, fusion, codec, sampler, _release(experiment, objective))


def check_across(objective: Objective, where: str) -> None:
    """Refuse losses that compare what two modalities have not in common. Raises `ConfigError`."""
    for number, term in enumerate(objective.terms):
        for kind in (*term.loss.needs, *term.loss.reads):
            if isinstance(kind, VirtualLogits):
                why = (
                    "virtual views, and no view of one modality is the same transformation of "
                    "another"
                )
            elif kind.of_maps:
                why = "feature maps, whose places mean nothing in another modality"
            else:
                continue
            raise ConfigError(
                f"{where}.{number}: loss {term.name!r} compares {why} ({kind}); teachers and "
                "student see different ones: take a loss over logits, pooled vectors or their "
                "relations"
            )


def with_heads(objective: Objective, where: str) -> None:
    """Raise `ConfigError` for losses that need one softmax over all classes, or no head's."""
    for number, term in enumerate(objective.terms):
        problem = term.headless()
        if problem is not None:
            raise ConfigError(f"{where}.{number}: loss {term.name!r} {problem}")


def with_parts(
    fusion: Sequence[Fusion], objective: Objective, where: str = "teachers.classes"
) -> None:
    """Raise `ConfigError` for what takes every teacher to know every class."""
    try:
        if not check_partial(fusion):
            objective.check_partial()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def build_data(
    experiment: Experiment, root: str | Path | None = None, own: LocalShard | None = None
) -> FederatedData:
    """The split of this experiment: the same on every machine with the same images.

    Args:
        experiment: The experiment.
        root: Folder of local data; overrides `data.root`.
        own: The images of the one client that lives on this machine, where it has no others.

    Raises:
        ConfigError: the images cannot be split this way.
        FileNotFoundError: images are missing; the message says how to get them.
    """
    data = experiment.data
    chosen = root or data.root
    place = _folder(chosen)
    public = own.public if own is not None and own.public else _public(experiment, place)
    if public is not None:
        try:
            return read_local_shard(
                public,
                own,
                clients=experiment.clients,
                transfer_labelled=data.transfer.labelled,
                holdout=data.holdout,
                seed=experiment.seed,
                student=experiment.student.modality,
                seen_by=experiment.modalities,
            )
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None
    if own is not None:
        raise ConfigError(
            "this node brings its own images, but the experiment deals those of a data set: set "
            "data.public in its config, or take `data` out of the node config"
        )
    noise = None
    if data.label_noise is not None:
        noise = build_label_noise(data.label_noise, "data.label_noise", chosen)
    if data.transfer.pairs:
        return _paired(experiment, place, noise)
    train, test, *own_validation = _load(data.dataset, place, "data.dataset")
    if own_validation and not data.validation:
        logger.warning(
            "data.validation is 0: the data set's %d validation images are not used",
            len(own_validation[0]),
        )
    other = data.transfer.dataset
    if other == data.dataset:
        raise ConfigError(
            f"data.transfer.dataset: {other.name!r} is the data set of the private images, which "
            "nobody else may hold; leave it out to set some of them apart"
        )
    transfer_images = None if other is None else _load(other, place, "data.transfer.dataset")[0]
    try:
        split = federate(
            train,
            test,
            partition=data.partition.name,
            partition_options=data.partition.options,
            transfer_images=transfer_images,
            validation_images=own_validation[0] if own_validation and data.validation else None,
            label_noise=noise,
            domains=None if data.domains is None else build_domains(data.domains, "data.domains"),
            **_split(experiment),
        )
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    heads = build_heads(experiment.student, train.classes)
    return split if heads is None else split.with_heads(heads, experiment.heads)


def build_heads(
    student: Student, classes: Sequence[str], where: str = "student.heads"
) -> Heads | None:
    """The student's heads over a data set's classes; None of one that has a single one.

    Raises:
        ConfigError: a head leaves a class out, names it twice or does not know it.
    """
    if not student.heads:
        return None
    try:
        return Heads.of(student.heads, classes, where)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _split(experiment: Experiment) -> dict[str, Any]:
    """How images are split, alike for one data set and for pairs of them."""
    data = experiment.data
    return {
        "clients": experiment.clients,
        "transfer_size": data.transfer.size,
        "transfer_labelled": data.transfer.labelled,
        "private_size": data.private,
        "validation_size": data.validation,
        "holdout": data.holdout,
        "test_size": data.test,
        "seed": experiment.seed,
    }


def build_label_noise(
    section: LabelNoiseSection, where: str, root: str | Path | None = None
) -> LabelNoise:
    """How labels go wrong, with its file below a folder of local data; None: FEDKD_DATA.

    Raises:
        ConfigError: keys that do not go together.
    """
    values = section.model_dump()
    if section.file is not None:
        place = _folder(root or os.environ.get("FEDKD_DATA")) or Path()
        values["file"] = place / Path(section.file).expanduser()
    try:
        return LabelNoise(**values)
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None


def build_domains(section: DomainsSection, where: str) -> Domains:
    """The domains. Raises `ConfigError`: there is none such, or one is listed twice."""
    for number, source in enumerate(section.sources):
        check_component(SHIFTS, source, f"{where}.sources.{number}")
    check_component(SHIFTS, section.target, f"{where}.target")
    shifts = [Shift(each.name, each.options) for each in (*section.sources, section.target)]
    try:
        return Domains(tuple(shifts[:-1]), shifts[-1])
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None


def _paired(experiment: Experiment, place: Path | None, noise: LabelNoise | None) -> FederatedData:
    """The split of paired data sets. Raises as `build_data`."""
    data = experiment.data
    sides, seen_by = {}, experiment.modalities
    for name, side in data.transfer.pairs.items():
        train, test = _load(side.dataset, place, f"data.transfer.pairs.{name}")[:2]
        dealt = side.partition or data.partition
        clients = tuple(client for client, seen in enumerate(seen_by) if seen == name)
        sides[name] = Side(train, test, clients, dealt.name, dealt.options)
    file, images = data.transfer.dataset, None
    try:
        if file is not None:
            path = (place or _folder(os.environ.get("FEDKD_DATA")) or Path()) / Path(
                str(file.options["path"])
            ).expanduser()
            images = read_pairs(path, {name: side.train.classes for name, side in sides.items()})
        return federate_pairs(
            sides,
            student=experiment.student.modality,
            by=data.transfer.by,
            transfer_images=images,
            label_noise=noise,
            **_split(experiment),
        )
    except ValueError as error:
        key = "data.transfer.pairs" if file is None or images else "data.transfer.dataset"
        raise ConfigError(f"{key}: {error}") from None


def data_root(experiment: Experiment, root: str | Path | None = None) -> Path:
    """The absolute folder that relative data paths start from, on this machine and now."""
    return files_root(root or experiment.data.root)


def files_root(given: str | Path | None) -> Path:
    """The absolute folder that relative paths start from: the one given, FEDKD_DATA, or this."""
    return (_folder(given or os.environ.get("FEDKD_DATA") or ".") or Path()).absolute()


def _load(dataset: Component, place: Path | None, key: str) -> Sets:
    try:
        return load_splits(dataset.name, place, **dataset.options)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _folder(chosen: str | Path | None) -> Path | None:
    try:
        return Path(chosen).expanduser() if chosen else None
    except RuntimeError as error:
        raise ConfigError(f"data.root or FEDKD_DATA: {chosen}: {error}") from None


def _public(experiment: Experiment, place: Path | None) -> Path | None:
    if experiment.data.public is None:
        return None
    root = place or _folder(os.environ.get("FEDKD_DATA")) or Path()
    return root / experiment.data.public


def build_network(
    experiment: Experiment,
    model: Component,
    data: FederatedData,
    *names: object,
    root: Path | None = None,
    notify: Callable[[str], None] = lambda _text: None,
    load: bool = True,
    whole: bool = False,
    classes: tuple[str, ...] | None = None,
) -> Network:
    """A fresh network: from its file, if the entry names one.

    Args:
        experiment: The experiment.
        model: The model's entry.
        data: Its images.
        *names: What is not in a file is drawn from the run seed's stream of these names.
        root: Folder that relative paths start from; None: `data_root`.
        notify: Called with what the user should know of the file.
        load: Whether the file is read; without, only the architecture is as it will be.
        whole: Whether the file must have the head too.
        classes: What it tells apart; None: all classes of the data.

    Raises:
        ConfigError: no such model, it cannot take the images, or the file does not fit.
    """
    root = root or data_root(experiment)
    try:
        return build_model(
            model.name,
            num_classes=len(classes or data.classes),
            in_channels=data.test.shape[0],
            image_size=data.test.side,
            mean=data.mean,
            std=data.std,
            seed=stream_seed(experiment.seed, *names),
            options=model.options,
            file=place_of(model.name, model.options, root) if load else None,
            root=root,
            classes=classes or data.classes,
            whole=whole,
            notify=notify,
            public=data.transfer.images.images,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def build_teacher(
    experiment: Experiment,
    model: Component,
    data: FederatedData,
    *names: object,
    root: Path | None = None,
    notify: Callable[[str], None] = lambda _text: None,
    load: bool = True,
    classes: tuple[str, ...] | None = None,
) -> Network:
    """What answers for a client: a network, or a pair of them. Arguments as in `build_network`."""
    given: dict[str, Any] = {"root": root, "notify": notify, "load": load, "classes": classes}
    first, second = build_pair(experiment, model, data, *names, **given)
    noisy = experiment.teachers.noisy
    return (
        first if second is None or noisy is None or noisy.answer == "a" else paired(first, second)
    )


def build_pair(
    experiment: Experiment, model: Component, data: FederatedData, *names: object, **given: Any
) -> tuple[Network, Network | None]:
    """The networks of a teacher: its own, and its partner where labels are noisy.

    Arguments as in `build_network`.

    Raises:
        ConfigError: they cannot be trained so.
    """
    first = build_network(experiment, model, data, *names, **given)
    noisy = experiment.teachers.noisy
    if noisy is None or noisy.method == "gmm":
        return first, None
    partner = noisy.partner.model or model
    second = build_network(experiment, partner, data, *names, "partner", **given)
    seed = stream_seed(experiment.seed, *names, "partner")
    return first, as_partner(noisy, first, second, (model, partner), seed)


def as_partner(
    noisy: Noisy,
    first: Network,
    second: Network,
    models: tuple[Component, Component],
    seed: int,
) -> Network:
    """`second`, in place, made the partner of `first`.

    Raises:
        ConfigError: unlearning could not begin, or the partner's head cannot be replaced.
    """
    if noisy.method != "acdu":
        return second
    try:
        check_unlearning(first, models[0].name)
        return with_new_head(second, seed, models[1].name)
    except ValueError as error:
        raise ConfigError(f"noisy: {error}") from None


def build_optimizer(section: OptimizerSection) -> Optimizer:
    """The options of an optimiser."""
    return Optimizer(**section.model_dump())


class LocalTraining(Passes):
    """Arguments of `fedkd.training.supervised.fit` that a config gives."""

    label_smoothing: float


def local_training(teachers: Teachers, epochs: int | None = None) -> LocalTraining:
    """How the clients train, in a config's number of epochs or another."""
    return LocalTraining(
        epochs=teachers.epochs if epochs is None else epochs,
        batch_size=teachers.batch_size,
        optimizer=build_optimizer(teachers.optimizer),
        augment=teachers.augment,
        label_smoothing=teachers.label_smoothing,
    )


def build_objective(
    terms: Sequence[LossTerm], where: str = "losses", *, epochs: int | None = None
) -> Objective:
    """The weighted sum of these terms.

    Args:
        terms: The terms.
        where: Their key in the config.
        epochs: Length of the training, in which every term has to count; None is not known.

    Raises:
        ConfigError: unknown name or option, or no loss counts in some epoch.
    """
    extra = tuple(set(LossTerm.model_fields) - {"name"})
    objective = Objective(
        [
            Term(
                _term_name(term, number, terms),
                create(LOSSES, term, f"{where}.{number}", extra),
                **{key: getattr(term, key) for key in extra},
            )
            for number, term in enumerate(terms)
        ]
    )
    if epochs is not None:
        try:
            objective.check(epochs)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    return objective


def _term_name(term: LossTerm, number: int, terms: Sequence[LossTerm]) -> str:
    """What a term is called in logs: its loss and head, and its place where that is not enough."""
    same = sum((other.name, other.head) == (term.name, term.head) for other in terms)
    name = term.name if same == 1 else f"{term.name}.{number}"
    return name if term.head is None else f"{name} ({term.head})"


def _release(experiment: Experiment, objective: Objective) -> Release | None:
    """The mechanism at the aggregator, if there is one. Raises `ConfigError`."""
    if experiment.release is None:
        return None
    release = create(RELEASES, experiment.release, "release")
    needs = [str(kind) for kind in objective.needs if kind != Logits()]
    if needs:
        raise ConfigError(
            f"distillation.losses: a release lets out labels or probabilities, the losses need "
            f"{', '.join(needs)}; use ce, kd or dkd"
        )
    if release.unit == "client" and experiment.data.partition.name == "sub_shards":
        raise ConfigError(
            "release.unit: an owner of several clients (data.partition: sub_shards) changes the "
            "votes of all of them, which the noise of one client does not cover; take unit: example"
        )
    asked = how_many(experiment.federation.participation.ask, experiment.clients)
    fewest = asked
    if (secure := release.secure) is not None:
        federation, fewest = experiment.federation, secure.least(asked)
        try:
            secure.check(asked)
        except ValueError as error:
            raise ConfigError(f"release.{error}") from None
        for where, wanted in (
            ("federation.quorum", math.ceil(federation.quorum * asked)),
            ("federation.participation.minimum", federation.participation.minimum),
        ):
            if wanted > fewest:
                raise ConfigError(
                    f"{where}: a round needs {wanted} clients, a secure sum {fewest}: its votes "
                    "would be spent for nothing; lower it, or lower release.secure.missing"
                )
    for key in ("min_votes", "min_clients"):
        needed = getattr(release, key, 0)
        if fewest < needed:
            where = "clients" if asked == experiment.clients else "federation.participation.ask"
            if fewest < asked:
                where = "release.secure.missing"
            raise ConfigError(
                f"{where}: {fewest} are too few for release "
                f"{experiment.release.name!r}, which needs {needed} (release.{key})"
            )
    try:
        release.noise_on_votes(release.queries or 1, experiment.rounds, asked)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return release


def device_of(experiment: Experiment) -> torch.device:
    """The server's device. Raises `ConfigError` if it does not exist here."""
    return device_named(experiment.resources.device)


_DEVICES = ("cpu", "cuda", "mps", "xpu")  # `meta` exists too, and computes nothing


def device_named(name: str) -> torch.device:
    """The device `name`; `auto` takes a GPU if there is one. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = f"expected auto, {' or '.join(_DEVICES)}"
    if name.split(":")[0] in _DEVICES:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            problem = str(error).splitlines()[0]
        else:
            return device
    raise ConfigError(
        f"resources.device: {name!r} is not usable here ({problem}); set resources.device=auto"
    )


def mirrored(experiment: Experiment) -> list[str]:
    """What is mirrored though it shows digits or letters, a line for each key that does it."""
    data, pairs = experiment.data, experiment.data.transfer.pairs
    shown = (data.transfer.dataset or data.dataset).name
    taught = [data.dataset.name]
    if pairs:
        sides = [pairs[name].dataset.name for name in experiment.student.modality]
        shown = next((name for name in sides if name in ONE_WAY_ROUND), sides[0])
        taught = [pairs[name].dataset.name for name in dict.fromkeys(experiment.modalities)]
    private = next((name for name in taught if name in ONE_WAY_ROUND), taught[0])
    found = {
        "teachers.augment": (private, experiment.teachers.augment),
        "distillation.augment": (shown, experiment.distillation.augment),
        "data.views.flip": (shown, "flip" if data.views.flip else "none"),
    }
    return [
        f"{key}: mirrors the images of data set {name!r}, where a mirror image is of another class "
        f"or of none; set {key}={'false' if key.endswith('flip') else 'crop'}"
        for key, (name, recipe) in found.items()
        if recipe in views.MIRRORING and name in ONE_WAY_ROUND
    ]


def check_augmentation(name: str, where: str) -> None:
    """Raise `ConfigError` if there is no such recipe."""
    try:
        views.check_augmentation(name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def create(
    registry: Registry[Made], component: Component, where: str, extra: tuple[str, ...] = ()
) -> Made:
    """Build a component.

    Args:
        registry: Of its family.
        component: Its name and options.
        where: Its key in the config.
        extra: Keys beside the options, for hints.

    Raises:
        ConfigError: an unknown name or option, or options that do not go together.
    """
    with _named(component, where, extra):
        return registry.create(component.name, **component.options)


def check_component(registry: Registry[Any], component: Component, where: str) -> None:
    """Check a component's name and options. Raises `ConfigError` that names the key."""
    with _named(component, where):
        registry.check(component.name, component.options)


@contextmanager
def _named(component: Component, where: str, extra: tuple[str, ...] = ()) -> Iterator[None]:
    """Name the key of a component in the errors of its constructor."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        for key in component.options:
            if f"option {key!r}" in message and (hint := nearest(key, list(extra))):
                message += hint
        raise ConfigError(f"{where}: {message}") from None


def check_noisy(noisy: Noisy | None, where: str) -> None:
    """Check the partner's model, if there is one. Raises `ConfigError`."""
    if noisy is not None and noisy.partner.model is not None:
        check_model(noisy.partner.model, f"{where}.partner.model")


def check_model(model: Component, where: str) -> None:
    """Likewise for a model, of ours or of another library, and what of it learns."""
    with _named(model, where):
        check_entry(model.name, model.options)
    if "peft" in model.options:
        _check_frozen(model, where)


def _check_frozen(model: Component, where: str) -> None:
    """Refuse to freeze what is known to be drawn at random; others' code may bring weights."""
    if model.name in MODELS.names():
        ours = MODELS.get(model.name).__module__.startswith("fedkd.models")
    else:
        ours = not is_target(model.name) and not model.name.startswith(HF)
    if ours and "weights" not in model.options:
        raise ConfigError(
            f"{where}.peft: what is frozen would stay at its random weights; set {where}.weights "
            "to a file of weights, or leave out peft"
        )
