"""Who is compared: the teachers and students of a run, or of a study of methods.

The independent students that neither has are trained here, by the one epoch loop and with the
student's own options, and kept in `inspect/` beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedkd.build import build_network, build_objective, build_optimizer, device_of
from fedkd.config import ConfigError, Resources, Term, one_head
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.trainer import EpochRecord, Snapshot, TrainerState, distill
from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Fused, Teacher
from fedkd.knowledge.query import Images as Asked
from fedkd.models.network import Network
from fedkd.randomness import stream, stream_seed
from fedkd.rounds import Client, ExperimentContext, Notify, computing, context_of_run
from fedkd.rounds.client_files import ClientFiles
from fedkd.runs.directory import RunDirectory, save_state, weights_hash
from fedkd.runs.events import RoundFinished
from fedkd.runs.export import load_student
from fedkd.studies.central.config import BASELINE, DistillConfig
from fedkd.studies.central.config import Resources as StudyResources
from fedkd.studies.central.folder import Place
from fedkd.studies.central.study import chain
from fedkd.studies.central.training import Images, load_trained, train
from fedkd.studies.engine import StudyFolder
from fedkd.training.evaluation import predict
from fedkd.training.properties.readers import Kept, Reader, Single, Weighed

FOLDER = "inspect"
#: Independent students in all: the one that began like the distilled one, and the control.
ALONE = 3
#: Teachers of a run that are also looked at one by one.
MOST = 12
DISTILLED = "student"


@dataclass(frozen=True)
class Trial:
    """Who is compared for one seed.

    Attributes:
        seed: Of the experiment.
        teacher: The teacher, or all together; None if there is nothing of them.
        why: Why not.
        teachers: Each by its name, where there are several.
        gradients: Stands in where a teacher would have to be looked into.
        distilled: Method -> its student.
        alone: Independent students; the first has the seed of the distilled one.
    """

    seed: int
    teacher: Reader | None
    why: str
    teachers: Mapping[str, Reader]
    gradients: Reader | None
    distilled: Mapping[str, Reader]
    alone: Sequence[Reader]


@dataclass(frozen=True)
class Subjects:
    """All of it.

    Attributes:
        name: Of the run or study.
        kind: "run" or "distill".
        images: Test images, chosen.
        rows: Which of all test images they are, as the data set gives them to the run or study.
        total: Test images in all.
        trials: One for each seed.
        about: Sentence on teacher and independent students.
        resources: Compute, of the config.
        notes: What people should know.
        clients: Client -> facts, of a run that tells.
    """

    name: str
    kind: str
    images: ImageSet
    rows: Tensor
    total: int
    trials: Sequence[Trial]
    about: str
    resources: Resources | StudyResources
    notes: Sequence[str] = ()
    clients: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def chosen_rows(total: int, count: int) -> Tensor:
    """Which test images are looked at, sorted: the same in every call."""
    order = torch.randperm(total, generator=stream(0, "inspect", "images"))
    return order[:count].sort().values


# -- a run ---------------------------------------------------------------------------------


def of_run(run: RunDirectory, count: int, notify: Notify) -> Subjects:
    """Teachers, student and independent students of a finished run.

    Raises:
        ConfigError: it has no student yet.
    """
    one_head(run.experiment.student, "an inspection", f"{run.path}: student.heads")
    run.import_plugins()
    student = load_student(run)
    context = context_of_run(run)
    experiment, data = run.experiment, context.data
    last = [event for event in run.events(RoundFinished) if event.answered]
    if not last:
        raise ConfigError(f"{run.path} has no finished round in which a client answered")
    number, device = last[-1].round, device_of(experiment)
    rows = chosen_rows(len(data.test), count)
    targets, source = _targets(run, context, number)
    with computing(experiment.resources, experiment.resources.server_threads):
        networks = [
            _independent(run, context, each, number, targets, notify) for each in range(ALONE)
        ]
    alone = [Single(f"independent {each}", one) for each, one in enumerate(networks)]
    looked = _Teachers.of(run, context, number, rows, device, last[-1].weights)
    gradients, notes = looked.stand_in(run, context, number, device)
    trial = Trial(
        seed=experiment.seed,
        teacher=looked.together,
        why=looked.why,
        teachers=looked.each,
        gradients=gradients,
        distilled={DISTILLED: Single("distilled", student.to(device))},
        alone=alone,
    )
    return Subjects(
        name=run.identity,
        kind="run",
        images=data.test.subset(rows),
        rows=rows,
        total=len(data.test),
        trials=[trial],
        about=(
            f"{looked.about} The independent students are the same "
            f"{experiment.student.model.name}, trained as long and with the same options on the "
            f"same {len(targets):,} transfer images, by cross entropy with {source}."
        ),
        resources=experiment.resources,
        notes=notes,
        clients=_clients(run, context, last[-1].weights),
    )


def _targets(run: RunDirectory, context: ExperimentContext, number: int) -> tuple[Tensor, str]:
    """What the independent students learn: classes of the transfer images, and what they are."""
    hidden = context.data.transfer.true_labels
    if hidden is not None:
        return hidden, "the true labels"
    try:
        fused = run.knowledge(number).fused("probabilities")
    except OSError as error:
        raise ConfigError(
            f"{run.path}: the transfer set has no true labels, and the fused ones of round "
            f"{number} are gone, so no independent student can be trained ({error})"
        ) from None
    if len(fused) != len(context.data.transfer.images):
        raise ConfigError(
            f"{run.path}: the transfer set has no true labels, and the fused ones of round "
            f"{number} are of {len(fused)} of its {len(context.data.transfer.images)} images: "
            "there is nothing that an independent student could learn alone"
        )
    return torch.from_numpy(np.array(fused)).argmax(dim=1), "the classes that the teachers fused to"


def _independent(
    run: RunDirectory,
    context: ExperimentContext,
    which: int,
    rounds: int,
    targets: Tensor,
    notify: Notify,
) -> Network:
    """A student that no teacher taught, trained in the run's rounds, epochs and batches.

    Args:
        run: Keeps it.
        context: Of the run.
        which: 0 begins with the weights of the distilled one, and sees the same batches.
        rounds: How many the student has learnt in.
        targets: Classes of the transfer images.
        notify: Receives progress.
    """
    experiment, options = run.experiment, run.experiment.distillation
    place = run.path / FOLDER / f"alone-{which}.pt"
    settings = {
        "experiment": experiment.hash,
        "rounds": rounds,
        "targets": weights_hash({"targets": targets}),
    }
    seed = experiment.seed + which
    model = experiment.student.model
    network = context.network(model, "student")
    if which:
        other = experiment.model_copy(update={"seed": seed})
        network = build_network(other, model, context.data, "student")
    network.to(device_of(experiment))
    label = f"independent student {which + 1} of {ALONE}"
    held = load_state(place) if place.is_file() else {}
    if held.get("settings") == settings:
        network.load_state_dict(held["weights"])
        return network.eval()
    numbers = range(1, rounds + 1) if options.warm_start else [rounds]
    notify("training", label=label, epochs=len(numbers) * options.epochs)
    images = context.data.transfer.images.images
    answers = functional.one_hot(targets, len(context.data.classes)).float()
    fused = Fused.of(Teacher(0), answers, targets=targets)
    state: TrainerState | None = None
    for done, number in enumerate(numbers):

        def on_epoch(record: EpochRecord, _snapshot: Snapshot, done: int = done) -> None:
            epoch = done * options.epochs + record.epoch
            notify("epoch", label=label, epoch=epoch, loss=record.loss)

        learning = stream_seed(seed, "learn", number)
        batches = TransferBatches(
            images,
            fused,
            augment=options.augment,
            batch_size=options.batch_size,
            seed=learning,
            device=network.mean.device,
        )
        _, state = distill(
            network,
            batches,
            build_objective([Term(name="ce")]),
            epochs=options.epochs,
            optimizer=build_optimizer(options.optimizer),
            trainer_state=state,
            seed=learning,
            on_epoch=on_epoch,
        )
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    save_state(place, {"settings": settings, "weights": weights})
    return network.eval()


@dataclass(frozen=True)
class _Teachers:
    """What there is of a run's teachers."""

    together: Reader | None
    each: Mapping[str, Reader]
    why: str
    about: str
    networks: bool

    @classmethod
    def of(
        cls,
        run: RunDirectory,
        context: ExperimentContext,
        number: int,
        rows: Tensor,
        device: torch.device,
        shares: Mapping[int, float],
    ) -> _Teachers:
        """Their networks where the run's folder keeps them, else the answers that they gave."""
        if run.experiment.release is not None:
            why = "release: what single teachers say stays with the aggregator"
            return cls(None, {}, why, "Of the teachers nothing is known here (release).", False)
        store = run.knowledge(number, Asked.TEST)
        answered = set(run.knowledge(number).clients())
        clients = [client for client in store.clients() if client in answered]
        found = _networks(run, context, number, clients or sorted(answered), device)
        if found:
            singles = {client: Single(_name(client), each) for client, each in found.items()}
            weights = _weights(run, number, list(found), clients, rows, shares)
            name = f"ensemble of {len(found)} teachers"
            about = (
                f"The teacher is the ensemble of {len(found)} clients' networks of round {number}, "
                "weighed as fusion weighed them."
            )
            each = {singles[client].name: singles[client] for client in _largest(found, shares)}
            return cls(Weighed(name, [*singles.values()], weights), each, "", about, True)
        why = "the teachers stayed with their clients, which are not asked about changed images"
        if ClientFiles(run.client(min(answered))).latest(number) is not None:
            why = "teachers see other images than the student, or know a part of the classes alone"
        together = _fused(run, number, "probabilities")
        if together is None or not clients:
            why = "the teachers stayed with their clients, and gave no answers about test images"
            return cls(None, {}, why, "Of the teachers nothing is known here.", False)
        fused = torch.from_numpy(together)[rows].clamp(min=1e-12).log()
        arrays = store.bank((Logits(),), clients).arrays[Logits()]
        answers = {
            client: Kept(_name(client), torch.from_numpy(np.array(array, np.float32))[rows], why)
            for client, array in zip(clients, arrays, strict=True)
            if array.shape[1] == len(context.data.classes)
        }
        kept = {answers[client].name: answers[client] for client in _largest(answers, shares)}
        about = f"The teacher is what {len(clients)} clients answered in round {number}, fused."
        return cls(Kept("ensemble", fused, why), kept, why, about, False)

    def stand_in(
        self, run: RunDirectory, context: ExperimentContext, number: int, device: torch.device
    ) -> tuple[Reader | None, list[str]]:
        """Who is looked into where the networks are not here: the student of the round before."""
        if self.networks:
            return None, []
        place = run.path / "checkpoints" / f"round-{number - 1:04d}.pt"
        what = "No teacher can be looked into"
        if not place.is_file():
            return None, [
                f"{what}, and no student of an earlier round can stand in for them: {self.why}."
            ]
        model = run.experiment.student.model
        before = context.network_with(model, load_state(place)["student"])
        text = f"{what}: {self.why}. For class maps and gradients, the student of round "
        text += f"{number - 1} stands in for them."
        return Single(f"student of round {number - 1}", before.to(device).eval()), [text]


def _name(client: int) -> str:
    return f"client {client}"


def _weights(
    run: RunDirectory,
    number: int,
    found: Sequence[int],
    clients: Sequence[int],
    rows: Tensor,
    shares: Mapping[int, float],
) -> Tensor:
    """Of each teacher on each image: fusion's own, or the mean of those on the transfer images."""
    weights = _fused(run, number, "weights")
    if weights is not None and len(weights) == len(clients) and list(found) == list(clients):
        return torch.from_numpy(weights)[:, rows]
    mean = torch.tensor([shares.get(client, 0.0) for client in found])
    mean = mean if mean.sum() > 0 else torch.ones(len(found))
    return (mean / mean.sum())[:, None].expand(-1, len(rows))


def _largest(clients: Collection[int], shares: Mapping[int, float]) -> list[int]:
    """Those with the largest part in the fused labels, in their order."""
    return sorted(sorted(clients, key=lambda client: -shares.get(client, 0.0))[:MOST])


def _fused(run: RunDirectory, number: int, name: str) -> np.ndarray | None:
    try:
        return np.array(run.knowledge(number, Asked.TEST).fused(name), np.float32)
    except OSError:
        return None


def _networks(
    run: RunDirectory,
    context: ExperimentContext,
    number: int,
    clients: Sequence[int],
    device: torch.device,
) -> dict[int, Network]:
    """Client -> its teacher, where the run's folder keeps it: all are needed, or none counts.

    Nor does a teacher of other images than the student's, or of a part of the classes.
    """
    black = torch.zeros(2, *context.data.test.shape, dtype=torch.uint8)
    found = {}
    for client in clients:
        if context.data.of(client).modality != context.data.modality:
            return {}
        folder = run.client(client)
        if ClientFiles(folder).latest(number) is None:
            return {}
        teacher = Client(context, client, run.identity, folder).teacher(number)
        if predict(teacher, black).shape[1] != len(context.data.classes):
            return {}
        found[client] = teacher.to(device).eval()
    return found


def _clients(
    run: RunDirectory, context: ExperimentContext, shares: Mapping[int, float]
) -> dict[int, dict[str, Any]]:
    """Client -> its share in the fused labels and its images per class; nothing of private runs."""
    if run.experiment.promises or not shares or context.data.seen_by:
        return {}
    counts = context.data.class_counts()
    return {
        client: {"share": share, "counts": counts[client].tolist()}
        for client, share in sorted(shares.items())
        if int(counts[client].sum())
    }


# -- a study of methods --------------------------------------------------------------------


def of_study(path: Path, count: int, notify: Notify, *, trust: bool = False) -> Subjects:
    """Teachers and students of a study of methods, of each seed that has finished.

    Raises:
        ConfigError: no method has finished with the student alone beside it.
    """
    folder = StudyFolder.open(path, DistillConfig, trust=trust)
    folder.import_plugins()
    config, path = folder.config, folder.path
    given, runs = config.experiment, config.runs()
    one_head(given.student, "an inspection", f"{path}: experiment.student.heads")
    images = Images.load(given)
    methods = [name for name in runs if name != BASELINE]

    def finished(name: str, seed: int) -> bool:
        return Place.of_student(path, name, seed).result() is not None

    seeds = [
        seed
        for seed in config.seeds
        if finished(BASELINE, seed) and any(finished(name, seed) for name in methods)
    ]
    methods = [name for name in methods if all(finished(name, seed) for seed in seeds)]
    if not seeds or not methods:
        raise ConfigError(
            f"{path}: no method has finished beside the student alone; finish the study first: "
            f"fedkd distill --resume {path}"
        )

    def load(place: Place) -> Network:
        network = load_trained(place.path, trust=trust).network
        assert isinstance(network, Network), "a study keeps networks"
        return network.to(images.device)

    more = [seed for seed in range(max(seeds) + 1, max(seeds) + ALONE) if seed not in seeds]
    alone = {seed: load(Place.of_student(path, BASELINE, seed)) for seed in seeds}
    for seed in more[: max(0, ALONE - len(seeds))]:
        place = Place(path / FOLDER / f"alone-{seed}", "student")
        place.claim({"experiment": runs[BASELINE].model_dump(mode="json"), "seed": seed})
        with computing(given.resources, given.resources.server_threads):
            ranks: list[list[Network]] = [[]]
            for task in chain(runs[BASELINE], BASELINE, seed, place, ranks):
                ranks.append([train(task, images, notify)])
            alone[seed] = ranks[-1][0].eval()
    students = {seed: Single(f"independent {seed}", each) for seed, each in alone.items()}
    order = list(students)
    trials: list[Trial] = []
    for seed in seeds:
        if not trials or given.teachers.per_seed:
            own = seed if given.teachers.per_seed else None
            together, why, each = _of_study(
                [
                    load(Place.of_teacher(path, number, own))
                    for number in range(len(given.teachers.models))
                ],
                images,
            )
        at = order.index(seed)
        trials.append(
            Trial(
                seed=seed,
                teacher=together,
                why=why,
                teachers=each,
                gradients=None,
                distilled={
                    name: Single(f"{name}, seed {seed}", load(Place.of_student(path, name, seed)))
                    for name in methods
                },
                alone=[students[one] for one in (order[at:] + order[:at])[:ALONE]],
            )
        )
    names = " and ".join(model.name for model in given.teachers.models)
    rows = chosen_rows(len(images.test), count)
    test = ImageSet(images.test.images.cpu(), _cpu(images.test.labels), images.test.classes)
    return Subjects(
        name=path.name,
        kind="distill",
        images=test.subset(rows),
        rows=rows,
        total=len(test),
        trials=trials,
        about=(
            f"The teacher is {names}. The independent students are the same "
            f"{given.student.model.name}, trained by cross entropy with the options of the study's "
            "student alone."
        ),
        resources=given.resources,
    )


def _of_study(
    networks: Sequence[Network], images: Images
) -> tuple[Reader | None, str, dict[str, Reader]]:
    """All teachers as one, why they cannot be, and each by its name where there are several."""
    if any(
        predict(each, images.test.images[:2]).shape[1] != len(images.test.classes)
        for each in networks
    ):
        return None, "a teacher knows a part of the classes alone", {}
    if len(networks) == 1:
        return Single("teacher", networks[0]), "", {}
    singles = [Single(f"teacher {number}", each) for number, each in enumerate(networks)]
    named: dict[str, Reader] = {each.name: each for each in singles}
    return Weighed(f"{len(singles)} teachers", singles), "", named


def _cpu(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.cpu()
