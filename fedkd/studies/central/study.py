"""A study from end to end: teachers, then a student by every method and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from fedkd.build import (
    build_objective,
    check_augmentation,
    check_component,
    check_model,
    device_named,
)
from fedkd.config import Component, ConfigError, Term
from fedkd.data import DATASETS
from fedkd.distillation.batches import EXAMPLE, Told
from fedkd.models.network import Network, parameter_count
from fedkd.randomness import seeded, stream_seed
from fedkd.rounds import Notify, silent, threads
from fedkd.runs.directory import load_state, network_hash, write_json
from fedkd.runs.signature import keep_images
from fedkd.studies.central.config import BASELINE, Study
from fedkd.studies.central.folder import Record, StudyFolder
from fedkd.studies.central.report import write_report
from fedkd.studies.central.results import results
from fedkd.studies.central.training import Images, Task, keep, train
from fedkd.studies.central.weights import load_weights


def check_study(study: Study) -> None:
    """Check names, options and files before anything is loaded. Raises `ConfigError`."""
    check_component(DATASETS, study.data.dataset, "data.dataset")
    for number, source in enumerate(study.teachers):
        check_model(source.model, f"teachers.{number}.model")
        file = source.checkpoint
        if file is not None and not Path(file).expanduser().is_file():
            raise ConfigError(f"teachers.{number}.checkpoint: there is no file {file}")
        check_augmentation(study.teacher_recipe(number).augment, "recipe.augment")
    check_model(study.student.model, "student.model")
    for number, model in enumerate(study.assistants):
        check_model(model, f"assistants.{number}")
    for name, method in study.runs().items():
        for number, model in enumerate(method.assistants or ()):
            check_model(model, f"methods.{name}.assistants.{number}")
        recipe = study.recipe_of(name)
        build_objective(method.losses, f"methods.{name}.losses", epochs=recipe.epochs)
        check_augmentation(recipe.augment, "recipe.augment")
        check_augmentation(recipe.virtual, "recipe.virtual")
    device_named(study.resources.device)


def prepare(study: Study) -> Images:
    """Check a study, load its images, and fit every method to untrained networks on a few of them.

    What would not fit after hours of training is said at once.

    Raises:
        ConfigError: a name, option, file or number is wrong, or a loss does not fit the networks.
        FileNotFoundError: images are missing; the message says how to get them.
    """
    check_study(study)
    images = Images.load(study)
    few = images.train.subset(torch.arange(min(EXAMPLE, len(images.train))))
    made: dict[str, Network] = {}

    def network(model: Component) -> Network:
        key = model.model_dump_json()
        if key not in made:
            made[key] = images.network(model, 0).eval()
        return made[key]

    teachers = [network(source.model) for source in study.teachers]
    for number, source in enumerate(study.teachers):
        images.first(source.train, f"teachers.{number}.train")
        if source.checkpoint is not None:
            where = f"teachers.{number}.checkpoint"
            _read(teachers[number], source.model, source.checkpoint, images, where)
    for method in study.runs():
        ranks = [teachers]
        for task in _chain(StudyFolder(Path(), study), method, 0, ranks):
            student = network(task.model)
            # Half precision is no matter of fit, and some CPUs are very slow at it.
            whole = task.recipe.model_copy(update={"precision": "float32"})
            task = replace(task, recipe=whole)
            objective = build_objective(task.terms).to(images.device)
            try:
                example = task.batches(images, objective, few).example()
                with seeded(0, "rehearsal"):
                    readings = example.read(student, objective.reads)
                    objective.adapt(readings, example.ensemble, 0)
                    for epoch in {term.start for term in task.terms}:
                        objective(readings, example.ensemble, example.targets, epoch, epoch)
            except ValueError as error:
                raise ConfigError(f"methods.{method}: {error}") from None
            ranks.append([student])
    return images


def run_study(folder: StudyFolder, images: Images, notify: Notify = silent) -> Record:
    """Run a study, or what is left of it, and write its results and its report.

    Args:
        folder: Where everything is written; what is finished there is not done again.
        images: From `prepare`; for a study that is gone on with, `Images.load` is enough.
        notify: Hears of progress. What it raises ends the study; the network under way keeps a
            checkpoint.

    Returns:
        The results, as in `results.json`.

    Raises:
        ConfigError: the study began with other images.
        RuntimeError: a loss is no longer finite.
    """
    study = folder.study
    with folder.lock, threads(study.resources.threads):
        keep_images(folder.path, "data", training=images.train, test=images.test)
        runner = _Runner(folder, images, notify)
        notify("plan", trainings=runner.trainings)
        for seed in study.seeds:
            for method in study.runs():
                runner.teach(method, seed)
                write_json(folder.path / "results.json", results(folder))
        write_report(folder)
    return results(folder)


class _Runner:
    """What lives as long as one run of a study."""

    def __init__(self, folder: StudyFolder, images: Images, notify: Notify) -> None:
        self.folder = folder
        self.study = folder.study
        self.images = images
        self.notify = notify
        self._teachers: dict[Path, Network] = {}
        self._told: Told = WeakKeyDictionary()

    @property
    def trainings(self) -> int:
        """Networks to train, teachers included."""
        study = self.study
        each = sum(1 + len(study.assistants_of(name)) for name in study.runs())
        own = len(study.seeds) if study.teachers_per_seed else 1
        return len(study.seeds) * each + own * len(study.teachers)

    # -- teachers --------------------------------------------------------------------------

    def teachers(self, seed: int) -> list[Network]:
        """The first teachers, trained or read on first use."""
        return [self._teacher(number, seed) for number in range(len(self.study.teachers))]

    def _teacher(self, number: int, seed: int) -> Network:
        study, place = self.study, self.folder.teacher(number, seed)
        key = place.path
        if key not in self._teachers:
            if number == 0:
                self._teachers.clear()  # those of the seed before
            root = stream_seed(seed if study.teachers_per_seed else 0, "teacher", number)
            source = study.teachers[number]
            task = Task(
                label=_numbered("teacher", number, len(study.teachers)),
                place=place,
                model=source.model,
                terms=(Term(name="ce"),),
                recipe=study.teacher_recipe(number),
                init=root,
                seed=root,
                images=self.images.first(source.train, f"teachers.{number}.train"),
                facts={"role": "teacher", "source": source.checkpoint},
            )
            if source.checkpoint is None:
                self._teachers[key] = train(task, self.images, self.notify)
            else:
                self._teachers[key] = self._loaded(task, source.checkpoint)
        return self._teachers[key]

    def _loaded(self, task: Task, file: str) -> Network:
        network = self.images.network(task.model, task.init)
        self.notify("training", label=task.label, epochs=1)
        if (result := task.place.result()) is not None:  # the file may have gone since
            network.load_state_dict(load_state(task.place.weights)["weights"])
        else:
            remark = _read(network, task.model, file, self.images, task.label)
            if remark is not None:
                self.notify("warning", text=remark)
            task.place.begin()
            keep(network, task, self.images)
            accuracy = self.images.accuracy(network)
            result = {
                **task.facts,
                "model": task.model.name,
                "parameters": parameter_count(network),
                "last": accuracy,
                "best": accuracy,
                "hash": network_hash(network),
            }
            task.place.finish(result)
        self.notify("trained", label=task.label, **result)
        return network.eval()

    # -- students --------------------------------------------------------------------------

    def teach(self, method: str, seed: int) -> Network:
        """Train the chain of a method, and at its end the student."""
        ranks = [self.teachers(seed)]
        for task in _chain(self.folder, method, seed, ranks):
            task = replace(task, told=self._told)
            ranks.append([train(task, self.images, self.notify)])
        return ranks[-1][0]


def _chain(
    folder: StudyFolder, method: str, seed: int, ranks: list[list[Network]]
) -> Iterator[Task]:
    """The tasks of a method, each made when those before it have joined `ranks`."""
    study = folder.study
    assistants = study.assistants_of(method)
    for number, model in enumerate((*assistants, study.student.model), start=1):
        last = number > len(assistants)
        role = "student" if last else f"assistant {number}"
        teachers, say = (
            ([], []) if method == BASELINE else _guides(ranks, study.guidance_of(method))
        )
        yield Task(
            label=f"{method}, seed {seed}" + ("" if last else f", {role}"),
            place=folder.student(method, seed) if last else folder.assistant(method, seed, number),
            model=model,
            terms=study.runs()[method].losses,
            recipe=study.recipe_of(method),
            # The same for every method, so that methods are compared on the same draws.
            init=stream_seed(seed, role),
            seed=stream_seed(seed, "learn", role),
            teachers=teachers,
            say=say,
            facts={"role": role, "method": method, "seed": seed},
        )


def _guides(ranks: Sequence[Sequence[Network]], guidance: str) -> tuple[list[Network], list[float]]:
    """Whom the next network learns from, and each one's weight: every rank has the same say."""
    chosen = ranks[-1:] if guidance == "next" else ranks
    return (
        [network for rank in chosen for network in rank],
        [1 / len(rank) for rank in chosen for _ in rank],
    )


def _numbered(name: str, number: int, of: int) -> str:
    return name if of == 1 else f"{name} {number}"


def _read(network: Network, model: Component, file: str, images: Images, where: str) -> str | None:
    name = f"{model.name} for {len(images.train.classes)} classes"
    try:
        return load_weights(network, Path(file).expanduser(), name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
