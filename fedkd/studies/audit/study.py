"""The audit of a finished run: teachers, what the server holds of them, student, and epsilon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from fedkd.config import ConfigError, one_head
from fedkd.data.images import ImageSet
from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Logits
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import Mechanism
from fedkd.randomness import stream_seed
from fedkd.rounds import ExperimentContext, Notify, silent
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.runs.export import load_student
from fedkd.studies.audit.mechanism import MechanismRecord
from fedkd.studies.audit.membership import (
    calibrated,
    confidence,
    halves,
    likelihood_ratio,
    membership,
)
from fedkd.studies.audit.one_run import Bound, audit_scores
from fedkd.studies.audit.promise import Claim, Training, promised, stronger, verdict
from fedkd.studies.audit.training import (
    Watch,
    joined,
    matched,
    mislabelled,
    proxy,
    static,
    tossed,
    train_again,
)
from fedkd.studies.audit.white_box import Observer
from fedkd.training.evaluation import predict

AUDIT = "audit.json"
FEWEST_CANARIES = 50

# Targets from the private images outwards.
_NEAREST = ("teacher", "knowledge", "student")


@dataclass(frozen=True)
class Options:
    """How hard the audit tries.

    Attributes:
        client: Whose teacher is trained again; None takes the one with most images, which gives
            the tightest intervals.
        shadows: Shadow models for LiRA; an even number, 0 for none.
        canaries: For the bound on epsilon, mislabelled images or, with DP-SGD, pictures of noise;
            0 for none.
        most: Images of either kind that an attack looks at.
        delta: Of the bound where nothing is claimed.
        draw: Which draw of canaries and coins, from 0. The same one finds the same again.
    """

    client: int | None = None
    shadows: int = 8
    canaries: int = 200
    most: int = 1000
    delta: float = 1e-5
    draw: int = 0

    def __post_init__(self) -> None:
        if self.shadows and (self.shadows < 2 or self.shadows % 2):
            raise ConfigError(f"--shadows: expected 0 or an even number, got {self.shadows}")
        if self.canaries and self.canaries < FEWEST_CANARIES:
            raise ConfigError(
                f"--canaries: expected 0 or at least {FEWEST_CANARIES}, got {self.canaries}: with "
                "fewer no guess can prove anything"
            )


class AttackRecord(TypedDict):
    """How one attack did on one target, a client's or everybody's; see `Membership`."""

    target: str
    attack: str
    client: int | None
    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]
    members: int
    others: int
    leaks: bool


class AuditRecord(TypedDict, total=False):
    """What `audit.json` holds: `Training`, `Options`, `Claim` and `Bound` as plain values.

    What was not audited is not there: only `run`, or `run` and `mechanism`, may be.
    """

    run: str
    client: int
    model: str
    promise: str
    training: dict[str, Any]
    options: dict[str, Any]
    attacks: list[AttackRecord]
    claim: dict[str, Any] | None
    bound: dict[str, Any] | None
    white_box: dict[str, Any] | None
    verdict: str
    mechanism: MechanismRecord


def audit_run(
    run: RunDirectory,
    context: ExperimentContext,
    options: Options,
    *,
    mechanism: Mechanism | None = None,
    claim: Claim | None = None,
    notify: Notify = silent,
) -> AuditRecord:
    """Attack a finished run and write what was found to `audit.json`.

    Reads private images, so it belongs where they are: in a simulation, or at a client. What it
    finds is about private images too.

    Args:
        run: Its clients' teachers must still be there.
        context: Of its experiment.
        options: How hard to try.
        mechanism: What if its teachers were trained so in each round? For runs that promise
            nothing; for the others it is known.
        claim: What if this were promised for the whole run? Likewise.
        notify: Receives each training.

    Raises:
        ConfigError: the run cannot be audited so.
    """
    if run.experiment.data.transfer.pairs:
        raise ConfigError(
            f"{run.path}: an audit attacks with images that all networks can be shown; the clients "
            "of this run see different modalities (data.transfer.pairs): audit a run of one"
        )
    one_head(run.experiment.student, "an audit", f"{run.path}: student.heads")
    if run.experiment.teachers.classes is not None:
        raise ConfigError(
            f"{run.path}: its clients know a part of the classes each (teachers.classes); an audit "
            "compares teachers of all classes"
        )
    data, seed = context.data, run.experiment.seed
    pool = unseen(context)
    client = chosen(context, options)
    promise = promised(run, context, client)
    if promise.text and (mechanism is not None or claim is not None):
        raise ConfigError(
            f"{run.path}: this run promises privacy itself, and that is what is audited; another "
            "mechanism or claim is for runs that promise nothing"
        )
    training, claim = promise.training, promise.claim or claim
    if mechanism is not None:
        training = replace(training, mechanism=mechanism)
    work = _Progress(notify, options.shadows + 1 + (options.canaries > 0))

    attacks = list(_all_teachers(run, context, pool, options.most))
    student = load_student(run, data)
    everyone = data.source.subset(np.concatenate(data.shard_rows))
    attacks += _loss(student, everyone, pool, options.most, seed, "student", None)

    attacks += _on_one_teacher(run, context, client, student, pool, training, options, work)

    bound = seen = None
    if options.canaries:
        work("canaries")
        delta = claim.delta if claim is not None else options.delta
        bound, seen = epsilon_of_training(
            context, client, pool, options.canaries, delta, training, options.draw
        )
    attacks.sort(key=lambda attack: _NEAREST.index(attack["target"]))
    facts: AuditRecord = {
        "client": client,
        "model": run.experiment.teachers.model_of(client).name,
        "promise": promise.text,
        "training": asdict(training),
        "options": asdict(options),
        "attacks": attacks,
        "claim": None if claim is None else asdict(claim),
        "bound": None if bound is None else asdict(bound),
        "white_box": None if seen is None else asdict(seen),
        "verdict": verdict(claim, stronger(bound, seen)),
    }
    return keep(run, facts)


def keep(run: RunDirectory, part: AuditRecord) -> AuditRecord:
    """Write what was found to `audit.json`, beside what is there of the other kind of audit."""
    facts: AuditRecord = {**(run.read_json(AUDIT) or {}), "run": run.identity, **part}
    run.write_json(AUDIT, facts)
    return facts


def _on_one_teacher(
    run: RunDirectory,
    context: ExperimentContext,
    client: int,
    student: Network,
    pool: ImageSet,
    training: Training,
    options: Options,
    work: _Progress,
) -> Iterator[AttackRecord]:
    """Attacks on one client: on its teacher, on what the server holds of it, on the student."""
    members, others = matched(
        context.data.shard(client), pool, options.most, context.experiment.seed
    )
    if len(members) == 0:
        raise ConfigError(
            f"--client {client}: no image that nobody trained on has a label of this client's"
        )
    target = _Target(joined(members, others), len(members), context.experiment.seed)
    teacher = _teacher(run, context, client)
    networks: dict[str, Network] = {"student": student}
    if (answers := _answers(run, client)) is not None:
        work("a proxy from what the server holds")
        networks["knowledge"] = proxy(context, answers)
    known = None
    if options.shadows:
        inside = halves(options.shadows, len(target.images), target.generator)
        shadows = []
        for number, learnt in enumerate(inside):
            work(f"shadow {number + 1}")
            images = target.images.subset(learnt.nonzero()[0])
            shadow = train_again(context, client, images, training, "shadow", number)
            shadows.append(target.confidence(shadow))
        known = np.stack(shadows), inside
        on = target.confidence(teacher)
        yield target.scored("teacher", "lira", client, likelihood_ratio(on, *known))
        yield target.scored("teacher", "lira offline", client, calibrated(on, *known))
    for name, network in networks.items():
        on = target.confidence(network)
        yield target.scored(name, "loss", client, on)
        if known is not None:
            yield target.scored(name, "calibrated", client, calibrated(on, *known))


def chosen(context: ExperimentContext, options: Options) -> int:
    """The client whose teacher is trained again. Raises `ConfigError` if there is none such."""
    data = context.data
    if options.client is None:
        return int(np.argmax([len(rows) for rows in data.shard_rows]))
    if not 0 <= options.client < data.num_clients:
        raise ConfigError(f"--client: this run's clients are 0 to {data.num_clients - 1}")
    return options.client


def unseen(context: ExperimentContext) -> ImageSet:
    """Labelled images that no teacher learnt: the clients' held-out parts and the test set.

    Raises `ConfigError` where they differ from those that teachers learnt in more than that.
    """
    data = context.data
    if context.experiment.data.label_noise is not None:
        raise ConfigError(
            "data.label_noise: the labels that this run's teachers learnt are partly wrong and "
            "those of other images are right, so that wrong ones alone would tell them apart: "
            "audit a run without it"
        )
    if context.experiment.teachers.noisy is not None:
        raise ConfigError(
            "teachers.noisy: shadow models are trained plainly, and teachers on noisy labels are "
            "not: what the audit finds would be about other teachers; audit a run without it"
        )
    if context.experiment.data.domains is not None:
        raise ConfigError(
            "data.domains: this run's teachers have learnt in other domains than that of the test "
            "images, which alone would tell them apart: audit a run without it"
        )
    held = data.source.subset(np.concatenate(data.holdout_rows))
    return joined(held, data.test)


def epsilon_of_training(
    context: ExperimentContext,
    client: int,
    pool: ImageSet,
    canaries: int,
    delta: float,
    training: Training,
    draw: int = 0,
) -> tuple[Bound, Bound | None]:
    """Train the client's teacher once more with half of the canaries, and guess which half.

    Returns:
        What the teacher's answers show; and with DP-SGD, what its noisy steps do. Then each holds
        at 97.5 %, so that both hold at 95 %.
    """
    seed = context.experiment.seed
    if draw:
        seed = stream_seed(seed, "audit", "draw", draw)
    shard, mechanism = context.data.shard(client), training.mechanism
    try:
        planted = (
            mislabelled(pool, canaries, seed)
            if mechanism is None
            else static(shard, canaries, seed)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    included = tossed(canaries, seed)
    images = joined(shard, planted.subset(included.nonzero()[0]))
    if mechanism is None:
        network = train_again(context, client, images, training, "canaries")
        return audit_scores(_known(network, planted), included, delta), None
    observers: list[Observer] = []

    def observed(teacher: Network) -> Watch:
        smoothing = context.experiment.teachers.label_smoothing
        observers.append(Observer(teacher, planted, shard, mechanism, smoothing))
        return observers[0].step

    network = train_again(context, client, images, training, "canaries", observed=observed)
    each = (_known(network, planted), observers[0].scores)
    bound, seen = (audit_scores(scores, included, delta, alpha=0.05 / 2) for scores in each)
    return bound, seen


def _known(network: Network, images: ImageSet) -> np.ndarray:
    assert images.labels is not None
    return confidence(predict(network, images.images), images.labels)


class _Target:
    """Images that an attack has to tell apart; the first `members` were trained on."""

    def __init__(self, images: ImageSet, members: int, seed: int) -> None:
        self.images, self.members = images, members
        self.generator = np.random.default_rng(stream_seed(seed, "audit", "bootstrap"))

    def confidence(self, network: Network) -> np.ndarray:
        return _known(network, self.images)

    def scored(
        self, target: str, attack: str, client: int | None, scores: np.ndarray
    ) -> AttackRecord:
        found = membership(scores[: self.members], scores[self.members :], self.generator)
        return {
            "target": target,
            "attack": attack,
            "client": client,
            "auc": found.auc,
            "auc_interval": found.auc_interval,
            "tpr": found.tpr,
            "tpr_interval": found.tpr_interval,
            "members": found.members,
            "others": found.others,
            "leaks": found.leaks,
        }


class _Progress:
    def __init__(self, notify: Notify, total: int) -> None:
        self._notify, self._total, self._done = notify, total, 0

    def __call__(self, note: str) -> None:
        self._notify("teacher", done=self._done, total=self._total, note=note)
        self._done += 1


def _loss(
    network: Network,
    members: ImageSet,
    others: ImageSet,
    most: int,
    seed: int,
    target: str,
    client: int | None,
) -> list[AttackRecord]:
    """The loss threshold; nothing if no class is on both sides."""
    mine, theirs = matched(members, others, most, seed)
    if len(mine) == 0:
        return []
    pair = _Target(joined(mine, theirs), len(mine), seed)
    return [pair.scored(target, "loss", client, pair.confidence(network))]


def _all_teachers(
    run: RunDirectory, context: ExperimentContext, pool: ImageSet, most: int
) -> Iterator[AttackRecord]:
    for client in range(context.data.num_clients):
        if len(context.data.shard_rows[client]):
            teacher = _teacher(run, context, client)
            shard, seed = context.data.shard(client), run.experiment.seed
            yield from _loss(teacher, shard, pool, most, seed, "teacher", client)


def _teacher(run: RunDirectory, context: ExperimentContext, client: int) -> Network:
    """The client's last teacher. Raises `ConfigError` if it is not in the run's folder."""
    places = sorted(run.client(client).glob("teacher-*.pt"))
    if not places:
        raise ConfigError(
            f"{run.path}: client {client} keeps no teacher in clients/; on real nodes the "
            "teachers stay there, and so must the audit"
        )
    experiment = run.experiment
    model = experiment.teachers.model_of(client)
    return context.network_with(model, load_state(places[-1])["weights"], client).eval()


def _answers(run: RunDirectory, client: int) -> Tensor | None:
    """The client's logits on the transfer set as the server holds them; None without any."""
    for event in reversed(run.events(RoundFinished)):
        store = run.knowledge(event.round)
        if client in store.clients():
            try:
                logits = store.answers(client, (Logits(),))[Logits()]
            except FileNotFoundError:  # the losses asked for other kinds alone
                return None
            return torch.from_numpy(np.array(logits, np.float32))
    return None
