"""The pieces in a notebook: train teachers, share, fuse, distil, without Flower or YAML.

Everything takes a registered name or an object of yours: a module as model, a `DistillationLoss`
as loss, any `Ensemble -> Ensemble` callable as fusion, whatever `ImageSet.from_dataset` takes as
images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from fedkd.build import LocalTraining, build_objective
from fedkd.config import Experiment
from fedkd.data.images import ImageSet
from fedkd.data.views import AUGMENTATIONS, MAGNITUDES, Strength, virtual_view
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import EpochRecord, distill
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion, fit_rules
from fedkd.knowledge.extract import Unreadable, extract, shapes
from fedkd.knowledge.kinds import DataStatistic, Kind
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Rule, Teacher, fuse
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, EnsembleLoss
from fedkd.models.arguments import (
    a_network,
    fitting,
    function,
    image_set,
    one_of,
    several,
    truth,
    whole,
)
from fedkd.models.build import build_model
from fedkd.models.entries import place_of
from fedkd.models.network import Network, parameter_count, shown
from fedkd.randomness import stream_seed
from fedkd.registry import Registry
from fedkd.training.optimizers import Optimizer, an_optimizer
from fedkd.training.properties.base import Case, Scene
from fedkd.training.properties.compare import Inspection, compare
from fedkd.training.properties.readers import Single, Weighed
from fedkd.training.supervised import fit

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What is not given is what an empty config has: one recipe, in one place.
_DEFAULT = Experiment()


def network(model: str | nn.Module, like: Any, *, seed: int = 0, **options: object) -> Network:
    """A network for images like these: right classes, channels, size and pixel statistics.

    Args:
        model: A registered name, `torchvision/<name>`, `timm/<name>`, `open_clip/<name>`,
            `hf/<folder>`, or a module of yours that maps normalised images to logits.
        like: Public images (use the transfer set: pixel statistics are taken from it). A `Network`
            comes back as it is if it fits them.
        seed: Seed of a named model's weights.
        **options: Options of a named model; `weights` is a file that it begins with. Of any model,
            `mean` and `std` per channel, if it is used to others than those of `like`.

    Raises:
        ValueError: an unknown name or option, a model that does not fit such images, or a file
            that does not fit the model.
    """
    like = image_set("like", like)
    seed = whole("seed", seed, 0)
    if isinstance(model, Network):
        if options:
            raise ValueError(f"model: a Network takes no options, got {options}")
        return fitting("model", model, like, "like")
    mean, std = like.statistics()
    return build_model(
        model,
        num_classes=len(like.classes),
        in_channels=like.shape[0],
        image_size=like.side,
        mean=mean,
        std=std,
        seed=seed,
        options=options,
        file=place_of(model, options, None) if isinstance(model, str) else None,
        classes=like.classes,
        notify=logger.warning,
        public=like.images,
    )


def train_teacher(
    teacher: Network,
    shard: Any,
    *,
    epochs: int = _DEFAULT.teachers.epochs,
    batch_size: int = _DEFAULT.teachers.batch_size,
    optimizer: Optimizer | None = None,
    augment: str = _DEFAULT.teachers.augment,
    seed: int = 0,
) -> Network:
    """Train a teacher in place on a labelled shard and return it.

    Defaults are those of `teachers` in a config.

    Raises:
        ValueError: an argument is none, or the teacher does not fit the images or the classes.
    """
    options = LocalTraining(
        epochs=whole("epochs", epochs, 1),
        batch_size=whole("batch_size", batch_size, 1),
        optimizer=an_optimizer("optimizer", optimizer),
        augment=one_of("augment", augment, list(AUGMENTATIONS)),
        label_smoothing=0.0,
    )
    seed = whole("seed", seed, 0)
    shard = image_set("shard", shard, labelled=True)
    fitting("teacher", a_network("teacher", teacher, "shard"), shard, "shard", trained=True)
    fit(teacher, shard, **options, seed=seed)
    return teacher


def train_student(
    student: str | nn.Module,
    teachers: Sequence[nn.Module],
    transfer: Any,
    *,
    losses: Sequence[str | DistillationLoss | EnsembleLoss | Term] | None = None,
    fusion: Sequence[str | Rule] | None = None,
    shards: Sequence[Any] | None = None,
    epochs: int = _DEFAULT.distillation.epochs,
    batch_size: int = _DEFAULT.distillation.batch_size,
    optimizer: Optimizer | None = None,
    augment: str = _DEFAULT.distillation.augment,
    strength: Strength = _DEFAULT.data.views.strength,
    flip: bool = _DEFAULT.data.views.flip,
    seed: int = 0,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Network:
    """Distil a list of teachers into one student on a transfer set, in this process.

    Defaults are those of a config: the recipe that was measured (docs/compare.md).

    Args:
        student: A registered name or a module; a module is trained in place.
        teachers: Modules that map images to logits over the transfer set's classes. A `Network`
            is used as it is; any other module gets the transfer set's normalisation in front.
        transfer: Common images; its labels are used if it has any, else the teachers' own.
        losses: Names, losses of yours, or `Term`s with a weight and a warm-up; default: those of
            `distillation.losses` in a config.
        fusion: Names or rules of yours, applied in order; default: `density_ratio` where there
            are shards to compare, else `uniform`.
        shards: Each teacher's private images, for rules that ask for counts or compare them
            with the transfer set.
        epochs: Passes over the transfer set.
        batch_size: Samples per step.
        optimizer: Optimiser and schedule.
        augment: Recipe of the images that the student sees; teachers answer about them as they are.
        strength: Strength of the virtual views.
        flip: Whether virtual views may be mirrored.
        seed: Seed of everything random.
        on_epoch: Called after every epoch.

    Returns:
        The student, in evaluation mode.

    Raises:
        ValueError: an argument is none, or a teacher or the student does not fit the images, the
            classes or what the losses ask for. The message begins with the argument's name.
    """
    epochs, batch_size = whole("epochs", epochs, 1), whole("batch_size", batch_size, 1)
    seed, flip = whole("seed", seed, 0), truth("flip", flip)
    one_of("strength", strength, list(MAGNITUDES))
    one_of("augment", augment, list(AUGMENTATIONS))
    optimizer = an_optimizer("optimizer", optimizer)
    function("on_epoch", on_epoch, "a record")
    recipe = build_objective(_DEFAULT.distillation.losses)
    objective = recipe if losses is None else Objective(_terms(losses))
    transfer = image_set("transfer", transfer)
    tapped = _teachers(teachers, transfer)
    rules = _rules(_default_fusion(len(tapped), shards) if fusion is None else fusion)
    shards = _shards(shards, len(tapped), transfer, rules)
    learner = _student(student, tapped, transfer, objective, seed)

    @cache
    def views(number: int) -> Tensor:
        return virtual_view(transfer.images, seed=seed, view=number, strength=strength, flip=flip)

    wanted = [kind for rule in rules if isinstance(rule, Fusion) for kind in rule.needs]
    kinds = tuple(dict.fromkeys((*objective.needs, *wanted)))
    knowledge = []
    for number, teacher in enumerate(tapped):
        counts = tuple(shards[number].class_counts().tolist()) if shards else None
        total = sum(counts) if counts else None
        who = Teacher(number, total, counts, parameter_count(teacher))
        own = shards[number].images if shards else None
        with _naming(f"teachers[{number}]", teacher, objective):
            tensors = extract(teacher, transfer.images, kinds, views=views, own=own)
        _check_finite(f"teachers[{number}]", tensors)
        knowledge.append(Knowledge(who, tensors))
    bank = Bank.of(knowledge)
    rules = fit_rules(rules, FitContext(bank, labels=transfer.labels, seed=seed))
    fused = fuse(bank, rules, labels=transfer.labels)
    batches = TransferBatches(
        transfer.images,
        fused,
        views=views,
        augment=augment,
        batch_size=batch_size,
        seed=seed,
        device=learner.mean.device,
    )
    distill(
        learner,
        batches,
        objective,
        epochs=epochs,
        optimizer=optimizer,
        seed=seed,
        on_epoch=None if on_epoch is None else lambda record, _snapshot: on_epoch(record),
    )
    return learner


def inspect(
    student: Network,
    teacher: Network | Sequence[Network],
    images: Any,
    *,
    alone: Sequence[Network] = (),
    what: str | Sequence[str] = "all",
    triplets: int = 50,
    groups: Tensor | None = None,
    marker: int | None = None,
    seed: int = 0,
) -> Inspection:
    """What the student has taken over from its teacher, beside accuracy.

    Args:
        student: The distilled student.
        teacher: Its teacher; of several the mean of their probabilities counts.
        images: Test images; without labels only what needs none is measured.
        alone: Independent students. The first should have begun with the student's weights; two
            more, of other seeds, show how large a difference is without any teacher.
        what: Names of properties, see `fedkd list properties`.
        triplets: Planes on which decision boundaries are compared.
        groups: Number of each image's group, (N,), for `bias`; None: its class.
        marker: Class that a white square in the corner may stand for, for `inherits`.
        seed: Of what is drawn: planes, crops, colours.

    Returns:
        Comparisons by name, and why others were left out.

    Raises:
        ValueError: an argument is none, or a network does not fit the images.
    """
    images = image_set("images", images)
    given = [teacher] if isinstance(teacher, nn.Module) else several("teacher", teacher, "networks")
    named = {"student": [student], "teacher": given, "alone": list(alone)}
    readers: dict[str, list[Single]] = {name: [] for name in named}
    for name, networks in named.items():
        for number, one in enumerate(networks):
            where = name if len(networks) == 1 else f"{name}[{number}]"
            fitted = fitting(where, a_network(where, one, "images"), images, "images")
            readers[name].append(Single(where, fitted))
    (learner,), teachers, others = readers["student"], readers["teacher"], readers["alone"]
    together = teachers[0] if len(teachers) == 1 else Weighed("teachers", teachers)
    names = () if groups is None else tuple(str(n) for n in range(int(groups.max()) + 1))
    if marker is not None and whole("marker", marker, 0) >= len(images.classes):
        raise ValueError(f"marker: expected a class below {len(images.classes)}, got {marker}")
    scene = Scene(
        images, whole("seed", seed, 0), whole("triplets", triplets, 1), groups, names, marker
    )
    first, unrelated = (others[n] if len(others) > n else None for n in range(2))
    return compare(Case(scene, together, first, None, unrelated), learner, others, what)


# -- what was given ------------------------------------------------------------------------


def _teachers(given: Sequence[nn.Module], transfer: ImageSet) -> list[Network]:
    """The teachers as networks that fit the transfer set, each another one."""
    found: list[Network] = []
    for number, teacher in enumerate(several("teachers", given, "trained networks")):
        name = f"teachers[{number}]"
        if isinstance(teacher, str):
            raise ValueError(
                f"{name}: {teacher!r} is a name, a teacher must have been trained; make one with "
                f"fedkd.train_teacher(fedkd.network({teacher!r}, transfer), shard)"
            )
        fitted = _fitted(name, teacher, transfer)
        for other, before in enumerate(found):
            if before.body is fitted.body:
                raise ValueError(f"{name}: is the same network as teachers[{other}]")
        found.append(fitted)
    return found


def _student(
    given: str | nn.Module,
    teachers: Sequence[Network],
    transfer: ImageSet,
    objective: Objective,
    seed: int,
) -> Network:
    """The student as a network that fits the transfer set and has what the losses read of it."""
    student = _fitted("student", given, transfer, stream_seed(seed, "student"), trained=True)
    learning = {id(p) for p in student.parameters() if p.requires_grad}
    for number, teacher in enumerate(teachers):
        if any(id(p) in learning for p in teacher.parameters()):
            raise ValueError(
                f"student: shares parameters with teachers[{number}], which would change while it "
                "teaches; give a copy.deepcopy of it"
            )
    with _naming("student", student, objective):
        shapes(student, objective.reads, transfer.shape)
    return student


def _fitted(
    name: str, given: str | nn.Module, transfer: ImageSet, seed: int = 0, *, trained: bool = False
) -> Network:
    """A `Network` that fits, or one made of a name or a module, named by the argument."""
    made = given
    if not isinstance(made, Network):
        try:
            made = network(given, transfer, seed=seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return fitting(name, made, transfer, "transfer", trained=trained)


def _shards(
    given: Sequence[ImageSet] | None, teachers: int, transfer: ImageSet, rules: Sequence[Rule]
) -> list[ImageSet] | None:
    """Each teacher's labelled images, if there are any or a rule asks for them."""
    if given is None:
        for number, rule in enumerate(rules):
            own = isinstance(rule, Fusion) and [
                *rule.discloses,
                *(str(kind) for kind in rule.needs if isinstance(kind, DataStatistic)),
            ]
            if own:
                raise ValueError(
                    f"shards: fusion[{number}] ({type(rule).__name__}) needs {', '.join(own)} of "
                    "every teacher; give the images that each has learnt from"
                )
        return None
    found = several("shards", given, "image sets, one per teacher")
    if len(found) != teachers:
        raise ValueError(f"shards: expected one per teacher, {teachers}, got {len(found)}")
    for number, shard in enumerate(found):
        name = f"shards[{number}]"
        shard = found[number] = image_set(name, shard, labelled=True)
        if (shard.shape, shard.classes) != (transfer.shape, transfer.classes):
            what = "images" if shard.shape != transfer.shape else "classes"
            raise ValueError(
                f"{name}: has other {what} than transfer "
                f"({_described(shard)} instead of {_described(transfer)})"
            )
    return found


def _described(images: ImageSet) -> str:
    names = ", ".join(map(str, images.classes[:3])) + ", ..." * (len(images.classes) > 3)
    size = "x".join(map(str, images.shape))
    return f"{size}, {len(images.classes)} classes: {names}"


def _terms(given: Sequence[str | DistillationLoss | EnsembleLoss | Term]) -> list[Term]:
    """The terms of the objective, each with a name of its own."""
    terms = [
        _term(f"losses[{number}]", item)
        for number, item in enumerate(several("losses", given, "losses"))
    ]
    names = [term.name for term in terms]
    return [
        replace(term, name=f"{term.name}.{number}") if names.count(term.name) > 1 else term
        for number, term in enumerate(terms)
    ]


def _term(where: str, item: str | DistillationLoss | EnsembleLoss | Term) -> Term:
    if isinstance(item, str):
        return Term(item, _created(where, LOSSES, item))
    if isinstance(item, Term):
        return item
    try:
        return Term(type(item).__name__, item)
    except ValueError as error:
        raise ValueError(
            f"{where}: expected a name of `fedkd list losses`, a loss or a fedkd.Term of one: "
            f"{error}"
        ) from None


def _default_fusion(teachers: int, shards: Sequence[ImageSet] | None) -> Sequence[str]:
    if shards is not None:
        return [rule.name for rule in _DEFAULT.fusion]
    if teachers > 1:
        logger.warning(
            "without shards all %d teachers count the same (fusion uniform); give train_student "
            "the images that each has learnt from, or a fusion",
            teachers,
        )
    return ["uniform"]


def _rules(given: Sequence[str | Rule]) -> list[Rule]:
    """The fusion rules; an empty list leaves all teachers alike."""
    if isinstance(given, list | tuple) and not given:
        return []
    rules: list[Rule] = []
    for number, item in enumerate(several("fusion", given, "rules")):
        where = f"fusion[{number}]"
        if isinstance(item, str):
            rules.append(_created(where, FUSIONS, item))
        elif isinstance(item, type) or not callable(item):
            hint = "; make one, with ()" if isinstance(item, type) else ""
            raise ValueError(
                f"{where}: expected a name of `fedkd list fusions` or a function of an ensemble, "
                f"got {shown(item)}{hint}"
            )
        else:
            rules.append(item if isinstance(item, Fusion) else _checked(where, item))
    return rules


def _checked(where: str, rule: Rule) -> Rule:
    """A rule of somebody's own, whose answer is looked at."""

    def ask(ensemble: Ensemble) -> Ensemble:
        answer: object = rule(ensemble)
        if not isinstance(answer, Ensemble):
            raise ValueError(f"{where}: expected an Ensemble back from it, got {shown(answer)}")
        return answer

    return ask


def _created(where: str, registry: Registry[T], name: str) -> T:
    try:
        return registry.create(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@contextmanager
def _naming(who: str, network: Network, objective: Objective) -> Iterator[None]:
    """Name which network has nothing of a kind, and which loss needs it."""
    try:
        yield
    except Unreadable as error:
        name = f"{who} ({type(network.body).__name__})"
        raise ValueError(f"{name}: {error}{objective.wanting(error.kind)}") from None


def _check_finite(who: str, tensors: Mapping[Kind, Tensor]) -> None:
    for kind, tensor in tensors.items():
        bad = ~tensor.isfinite()
        if bad.any():
            rows = bad.flatten(1).any(dim=1) if tensor.ndim > 1 else bad
            where = f" for {int(rows.sum())} of {len(rows)} images" if kind.per_sample else ""
            raise ValueError(f"{who}: its {kind} are nan or infinite{where}")
