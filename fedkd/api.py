"""The pieces in a notebook: train teachers, share, fuse, distil, without Flower or YAML.

Everything takes a registered name or an object of yours: a module as model, a `DistillationLoss`
as loss, any `Ensemble -> Ensemble` callable as fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fedkd.config import Optimizer, Teachers
from fedkd.data.images import ImageSet
from fedkd.data.views import Strength, virtual_view
from fedkd.distillation import EpochRecord, distill
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import Evidence, Fusion, fit_rules
from fedkd.knowledge.extract import extract
from fedkd.knowledge.payload import Bank, Knowledge, Rule, Teacher, fuse
from fedkd.lessons import SharedLessons
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, EnsembleLoss
from fedkd.models.build import build_model
from fedkd.models.network import Network, parameter_count
from fedkd.objective import Objective, Term
from fedkd.randomness import stream_seed
from fedkd.teachers.sgd import fit


def network(model: str | nn.Module, like: ImageSet, *, seed: int = 0, **options: object) -> Network:
    """A network for images like these: right classes, channels, size and pixel statistics.

    Args:
        model: A registered name, `torchvision/<name>`, or a module of yours that maps normalised
            images to logits.
        like: Public images (use the transfer set: pixel statistics are taken from it).
        seed: Seed of a named model's weights.
        **options: Options of a named model.
    """
    if isinstance(model, Network):
        return model
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
    )


def train_teacher(
    teacher: Network,
    shard: ImageSet,
    *,
    epochs: int = 10,
    batch_size: int = 32,
    optimizer: Optimizer | None = None,
    augment: str = "none",
    seed: int = 0,
) -> Network:
    """Train a teacher in place on a labelled shard and return it."""
    options = Teachers(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer or Optimizer(), augment=augment
    )
    fit(teacher, shard, options, seed=seed)
    return teacher


def train_student(
    student: str | nn.Module,
    teachers: Sequence[nn.Module],
    transfer: ImageSet,
    *,
    losses: Sequence[str | DistillationLoss | EnsembleLoss | Term] = ("dkd", "vrm"),
    fusion: Sequence[str | Rule] = ("uniform",),
    shards: Sequence[ImageSet] | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    optimizer: Optimizer | None = None,
    strength: Strength = "moderate",
    flip: bool = False,
    seed: int = 0,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Network:
    """Distil a list of teachers into one student on a transfer set, in this process.

    Args:
        student: A registered name or a module; a module is trained in place.
        teachers: Modules that map images to logits over the transfer set's classes. A `Network`
            is used as it is; any other module gets the transfer set's normalisation in front.
        transfer: Common images; its labels are used if it has any, else the teachers' own.
        losses: Names, losses of yours, or `Term`s with a weight and a warm-up.
        fusion: Names or rules of yours, applied in order.
        shards: Each teacher's private images, for rules that ask for counts or compare them
            with the transfer set.
        epochs: Passes over the transfer set.
        batch_size: Samples per step.
        optimizer: Optimiser and schedule.
        strength: Strength of the virtual views.
        flip: Whether virtual views may be mirrored.
        seed: Seed of everything random.
        on_epoch: Called after every epoch.

    Returns:
        The student, in evaluation mode.

    Raises:
        ValueError: no teachers, unknown names, or shapes that do not fit.
    """
    objective = Objective([_term(item) for item in losses])
    rules = [FUSIONS.create(rule) if isinstance(rule, str) else rule for rule in fusion]
    cache: dict[int, Tensor] = {}

    def views(number: int) -> Tensor:
        if number not in cache:
            cache[number] = virtual_view(
                transfer.images,
                seed=seed,
                view=number,
                strength=strength,
                flip=flip,
            )
        return cache[number]

    wanted = [kind for rule in rules if isinstance(rule, Fusion) for kind in rule.needs]
    kinds = tuple(dict.fromkeys((*objective.needs, *wanted)))
    knowledge = []
    for number, teacher in enumerate(teachers):
        tapped = network(teacher, transfer)
        counts = tuple(shards[number].class_counts().tolist()) if shards else None
        total = sum(counts) if counts else None
        who = Teacher(number, total, counts, parameter_count(tapped))
        own = shards[number].images if shards else None
        tensors = extract(tapped, transfer.images, kinds, views=views, own=own)
        knowledge.append(Knowledge(who, tensors))
    bank = Bank.of(knowledge)
    rules = fit_rules(rules, Evidence(bank, labels=transfer.labels, seed=seed))
    fused = fuse(bank, rules, labels=transfer.labels)
    learner = network(student, transfer, seed=stream_seed(seed, "student"))
    lessons = SharedLessons(
        transfer.images,
        fused,
        views=views,
        batch_size=batch_size,
        seed=seed,
        device=learner.mean.device,
    )
    distill(
        learner,
        lessons,
        objective,
        epochs=epochs,
        optimizer=optimizer,
        seed=seed,
        on_epoch=None if on_epoch is None else lambda record, _snapshot: on_epoch(record),
    )
    return learner


def _term(item: str | DistillationLoss | EnsembleLoss | Term) -> Term:
    if isinstance(item, Term):
        return item
    if isinstance(item, str):
        return Term(item, LOSSES.create(item))
    return Term(type(item).__name__, item)
