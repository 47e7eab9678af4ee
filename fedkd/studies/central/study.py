"""The study of methods: teachers, then a student by every method and seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from fedkd.build import (
    build_domains,
    build_label_noise,
    build_objective,
    check_across,
    check_augmentation,
    check_component,
    check_model,
    check_noisy,
    device_named,
    with_heads,
    with_parts,
)
from fedkd.config import Component, ConfigError, Energy, Term
from fedkd.data import DATASETS
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import EXAMPLE, Statistics
from fedkd.io.tensors import file_hash, load_state
from fedkd.models.costs import size_of
from fedkd.models.entries import files_of
from fedkd.models.network import Network
from fedkd.randomness import seeded, stream_seed
from fedkd.rounds import Notify, computing, silent
from fedkd.rounds.costs import energy_source, with_energy
from fedkd.runs.directory import keep_weights, network_hash
from fedkd.runs.tracking import check_trackers
from fedkd.studies.central.config import BASELINE, Central, DistillConfig, Teachers
from fedkd.studies.central.folder import Place, StudentRecord
from fedkd.studies.central.report import write_report
from fedkd.studies.central.training import (
    Images,
    Task,
    domain_record,
    ensemble_accuracy,
    keep,
    train,
)
from fedkd.studies.engine import Cell, Found, Record, Study, spread


class DistillStudy(Study[DistillConfig, None]):
    """A student for every method and seed."""

    config_class = DistillConfig
    records = (StudentRecord,)

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config)
        self.runs = config.runs()
        self._images: Images | None = None
        self._teachers: list[Network] = []
        self._answers: Statistics = WeakKeyDictionary()

    def check(self) -> None:
        """Check names, files and numbers, and fit every method to untrained networks on few images.

        What would not fit after hours of training is found here.
        """
        check_names(self.config)
        check_trackers(self.config.experiment.track, "experiment.track")
        _rehearse(self.config, self._loaded_images())

    def make_cells(self) -> list[Cell[None]]:
        """Each method for each seed."""
        return [
            Cell(name, seed, f"methods/{name}/seed{seed}", experiment, None)
            for seed in self.config.seeds
            for name, experiment in self.runs.items()
        ]

    def images(self, seed: int) -> Mapping[str, Mapping[str, ImageSet]]:
        """The same for all seeds."""
        images = self._loaded_images()
        found = {"training": images.train, "test": images.test}
        for name, side in images.sides.items():
            found |= {f"{name} training": side.everything, f"{name} test": side.test}
        return {"data": found}

    def begin(self, folder: Path, seed: int, notify: Notify) -> None:
        """Train the teachers, or read them."""
        given, images = self.config.experiment, self._loaded_images()
        keep_weights(folder, _files(self.config, images))
        images.told(notify)
        if self._teachers and not given.teachers.per_seed:
            return
        with computing(given.resources, given.resources.server_threads):
            self._teachers = [
                _teacher(self.config, number, folder, seed, images, notify)
                for number in range(len(given.teachers.models))
            ]

    def run_cell(self, folder: Path, cell: Cell[None], notify: Notify = silent) -> Record:
        """Train the chain of a method, and at its end the student."""
        given, images, ranks = cell.experiment, self._loaded_images(), [self._teachers]
        assert isinstance(given, Central)
        place = Place.of_student(folder, cell.name, cell.seed)
        place.claim(cell.settings())
        with computing(given.resources, given.resources.server_threads):
            for task in chain(given, cell.name, cell.seed, place, ranks):
                task = replace(task, answers=self._answers, study=self.config.name)
                if images.domains is not None:
                    shown = images.for_student(images.train, baseline=cell.name == BASELINE)
                    task = replace(task, images=shown)
                ranks.append([train(task, images, notify)])
            record = dict(place.result() or {})
            if (count := given.distillation.generations) > 1:
                students = [network for rank in ranks[-count:] for network in rank]
                own = task.heads or None
                record["generations"] = [images.accuracy(s, only=own) for s in students]
                record["ensemble"] = ensemble_accuracy(students, images, own)
        return record

    def results(self, folder: Path, found: Found) -> Record:
        """Teachers and methods, with means and deviations over the seeds."""
        given, seeds = self.config.experiment, self.config.seeds
        teachers = []
        for number, model in enumerate(given.teachers.models):
            each = seeds if given.teachers.per_seed else (None,)
            done = [Place.of_teacher(folder, number, seed).result() for seed in each]
            source = given.teachers.checkpoint_of(number)
            row = {"model": model.name, "source": source, **_row(done)}
            if seen := given.teachers.modality_of(number):
                row["modality"] = seen
            teachers.append(row)
        methods = {}
        for name, experiment in self.runs.items():
            options = experiment.distillation
            own = {seed: record for (row, seed), record in found.items() if row == name}
            methods[name] = {
                "losses": [{"name": _term_name(t), "weight": t.weight} for t in options.losses],
                "assistants": [model.name for model in options.assistants],
                "assistant_mode": options.assistant_mode if options.assistants else None,
                "generations": [
                    spread(list(each))
                    for each in zip(*(r["generations"] for r in own.values() if "ensemble" in r))
                ],
                "ensemble": spread([record.get("ensemble") for record in own.values()]),
                "seeds": {str(seed): record for seed, record in own.items()},
                **_row(list(own.values())),
            }
        return {
            "energy": _add_energy(given.resources.energy, [*teachers, *methods.values()]),
            "heads": list(given.student.heads),
            "dataset": given.data.dataset.name
            if not given.data.pairs
            else f"pairs of {' and '.join(given.data.pairs)}",
            "student": given.student.model.name,
            "teachers": teachers,
            "methods": methods,
        }

    def write(self, folder: Path, results: Record) -> None:
        """The page."""
        write_report(self.config, folder, results)

    def _loaded_images(self) -> Images:
        if self._images is None:
            self._images = Images.load(self.config.experiment)
        return self._images


def _term_name(term: Term) -> str:
    return term.name if term.head is None else f"{term.name} ({term.head})"


def _row(found: Sequence[Record | None]) -> Record:
    done = [result for result in found if result is not None]
    row: Record = {
        key: done[0].get(key) if done else None
        for key in ("parameters", "trainable", "multiply_adds")
    }
    for key in ("last", "best"):
        row[key] = spread([result[key] for result in done])
    row["ece"] = spread([result.get("ece") for result in done])
    row["ece_scaled"] = spread([result.get("temperature", {}).get("ece") for result in done])
    for key in ("sources", "heads"):
        if done and all(key in result for result in done):
            row[key] = {
                name: spread([result[key][name] for result in done]) for name in done[0][key]
            }
    for key in ("images_per_second", "seconds", "joules"):
        known = [result[key] for result in done if result.get(key) is not None]
        row[key] = statistics.fmean(known) if known else None
    for key in ("memory", "gpu_memory"):
        row[key] = max((result[key] for result in done if result.get(key)), default=None)
    return row


def _add_energy(options: Energy, rows: Sequence[Record]) -> str | None:
    """Joules of every row that was trained; how they are known."""
    trained = [row for row in rows if row["seconds"]]
    counted = bool(trained) and all(row["joules"] is not None for row in trained)
    for row in trained:
        with_energy(row, row["joules"] if counted else None, options)
    return energy_source(options, counted, gpus=any(row["gpu_memory"] for row in trained))


def check_names(config: DistillConfig) -> None:
    """Check names, options and files before anything is loaded. Raises `ConfigError`."""
    given = config.experiment
    check_component(DATASETS, given.data.dataset, "experiment.data.dataset")
    for name, side in given.data.pairs.items():
        check_component(DATASETS, side, f"experiment.data.pairs.{name}")
    if given.data.label_noise is not None:
        build_label_noise(given.data.label_noise, "experiment.data.label_noise")
    if (domains := given.data.domains) is not None:
        build_domains(domains, "experiment.data.domains")
        if len(given.teachers.models) < len(domains.sources):
            raise ConfigError(
                f"experiment.data.domains.sources: {len(domains.sources)} domains for "
                f"{len(given.teachers.models)} teachers, so that one would have nobody; name more "
                "teachers.models or fewer sources"
            )
    for number in range(len(given.teachers.models)):
        check_model(entry_of(given, number), f"experiment.teachers.models.{number}")
        file = given.teachers.checkpoint_of(number)
        if file is not None and "peft" in given.teachers.models[number].options:
            raise ConfigError(
                f"experiment.teachers.checkpoints.{number}: a teacher with peft starts from "
                f"experiment.teachers.models.{number}.weights; give the file there"
            )
        if file is not None and not Path(file).expanduser().is_file():
            raise ConfigError(f"experiment.teachers.checkpoints.{number}: there is no file {file}")
    check_noisy(given.teachers.noisy, "experiment.teachers.noisy")
    check_augmentation(given.teachers.augment, "experiment.teachers.augment")
    check_model(given.student.model, "experiment.student.model")
    for name, experiment in config.runs().items():
        options, where = experiment.distillation, f"methods.{name}: distillation"
        for key in ("unlabelled", "noisy") if domains is not None else ():
            if getattr(options, key):
                raise ConfigError(
                    f"{where}.{key}: with experiment.data.domains no image that a student sees has "
                    "a label; leave it out"
                )
        for number, model in enumerate(options.assistants):
            check_model(model, f"{where}.assistants.{number}")
        check_noisy(options.noisy, f"{where}.noisy")
        objective = build_objective(options.losses, f"{where}.losses", epochs=options.epochs)
        if given.student.heads:
            with_heads(objective, f"{where}.losses")
        if given.teachers.classes is not None and name != BASELINE:
            with_parts([], objective, f"methods.{name}: teachers.classes")
        if given.crosses_modalities and name != BASELINE:
            check_across(objective, f"{where}.losses")
        check_augmentation(options.augment, f"{where}.augment")
        check_augmentation(options.virtual, f"{where}.virtual")
    device_named(given.resources.device)


def _rehearse(config: DistillConfig, images: Images) -> None:
    """Each method's objective once, on networks as they are built."""
    few = images.train.subset(torch.arange(min(EXAMPLE, len(images.train))))
    made: dict[str, Network] = {}

    def network(
        model: Component, knows: tuple[bool, ...] | None = None, seen: Images = images
    ) -> Network:
        key = f"{seen.modality} {model.model_dump_json()}{knows}"
        if key not in made:
            made[key] = seen.network(model, 0, knows=knows).eval()
        return made[key]

    given = config.experiment.teachers
    teachers = []
    for number, model in enumerate(given.models):
        seen = images.of(given.modality_of(number))
        teachers.append(_answering(given, number, network, seen))
        seen.for_teacher(number, given.train_of(number), "experiment.teachers.train")
        if (file := given.checkpoint_of(number)) is not None:
            where = f"experiment.teachers.checkpoints.{number}"
            _read(model, 0, file, seen, where, seen.known(given, number))
    for name, experiment in config.runs().items():
        ranks = [teachers]
        for task in chain(experiment, name, 0, Place(Path(), "student"), ranks):
            if task.recipe.noisy is not None:
                _tried(task, images, f"methods.{name}: distillation")
            task.network(images)
            student = network(task.model)
            # Half precision is no matter of fit, and some CPUs are very slow at it.
            task = replace(task, recipe=task.recipe.model_copy(update={"precision": "float32"}))
            objective = task.objective(images).to(images.device)
            try:
                shown = images.for_student(few, baseline=name == BASELINE)
                example = task.batches(images, objective, shown).example()
                with seeded(0, "rehearsal"):
                    readings = example.read(student, objective.reads)
                    objective.adapt(readings, example.ensemble, 0)
                    for epoch in {term.start for term in task.terms}:
                        objective(readings, example.ensemble, example.targets, epoch, epoch)
            except ValueError as error:
                raise ConfigError(f"methods.{name}: {error}") from None
            ranks.append([student])


def _answering(
    given: Teachers, number: int, network: Callable[..., Network], images: Images
) -> Network:
    """An untrained teacher, or a pair of them."""
    model = given.models[number]
    if given.noisy is None:
        return network(model, images.known(given, number), images)
    task = Task("teacher", Place(Path(), "teacher"), model, (Term(name="ce"),), given, 0, 0)
    return _tried(task, images, "experiment.teachers").eval()


def _tried(task: Task, images: Images, where: str) -> Network:
    """What a training on noisy labels leads to. Raises `ConfigError` that names the section."""
    try:
        return task.pair(images).network
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None


def _teacher(
    config: DistillConfig, number: int, folder: Path, seed: int, images: Images, notify: Notify
) -> Network:
    given = config.experiment
    teachers, file = given.teachers, given.teachers.checkpoint_of(number)
    images = images.of(teachers.modality_of(number))
    root = stream_seed(seed if teachers.per_seed else 0, "teacher", number)
    place = Place.of_teacher(folder, number, seed if teachers.per_seed else None)
    keys = {"data", "teachers", "resources"}
    elsewhere = {"resources": {"ray_address", "energy"}}
    made = given.model_dump(mode="json", include=keys, exclude=elsewhere)
    if given.student.heads:
        made["heads"] = given.student.model_dump(mode="json", include={"heads"})
    if given.data.pairs:  # they are drawn from the student's side
        made["student"] = {"modality": list(given.student.modality)}
    place.claim(made)
    own = images.for_teacher(number, teachers.train_of(number), "experiment.teachers.train")
    knows = images.known(teachers, number)
    if images.heads is not None:
        own = images.heads.labelled(own, images.dealt[number]).among(knows)
    elif knows is not None and own.labels is not None:
        own = own.subset(torch.tensor(knows)[own.labels].nonzero()[:, 0]).among(knows)
    task = Task(
        label="teacher" if len(teachers.models) == 1 else f"teacher {number}",
        place=place,
        model=teachers.models[number],
        terms=(Term(name="ce"),),
        recipe=teachers,
        init=root,
        seed=root,
        images=own,
        facts={"role": "teacher", "source": file}
        | ({"modality": images.modality} if images.modality else {}),
        knows=knows,
        study=config.name,
        given=given,
    )
    return train(task, images, notify) if file is None else _loaded(task, file, images, notify)


def _loaded(task: Task, file: str, images: Images, notify: Notify) -> Network:
    notify("training", label=task.label, epochs=1)
    if (result := task.place.result()) is not None:  # the file may have gone since
        network = task.network(images, load=False)
        network.load_state_dict(load_state(task.place.weights)["weights"])
    else:
        network = _read(task.model, task.init, file, images, task.label, task.knows)
        images.told(notify)
        task.place.begin()
        keep(network, task, images)
        accuracy = images.accuracy(network)
        result = {
            **task.facts,
            "model": task.model.name,
            **size_of(network, images.train.shape).facts,
            "last": accuracy,
            "best": accuracy,
            "hash": network_hash(network),
            **domain_record(network, images),
            **({"heads": images.by_head(network)} if images.heads is not None else {}),
        }
        task.place.finish(result)
    notify("trained", label=task.label, **result)
    return network.eval()


def chain(
    given: Central,
    method: str,
    seed: int,
    place: Place,
    ranks: list[list[Network]],
) -> Iterator[Task]:
    """The tasks of a method, each made when those before it have joined `ranks`."""
    options = given.distillation
    eyes = [given.teachers.modality_of(number) for number in range(len(given.teachers.models))]
    helpers, total = len(options.assistants), options.generations
    models = (*options.assistants, *[given.student.model] * total)
    for number, model in enumerate(models, start=1):
        generation = number - helpers  # of students, from 1
        last = generation == total
        role, where = "student", place
        if generation < 1:
            role, where = f"assistant {number}", place.assistant(number)
        elif not last:
            role, where = f"generation {generation}", place.generation(generation)
        # A later generation has the one before it for its only teacher.
        mode = "takd" if generation > 1 else options.assistant_mode
        teachers, weights = ([], []) if method == BASELINE else _guides(ranks, mode)
        yield Task(
            label=f"{method}, seed {seed}" + ("" if last else f", {role}"),
            place=where,
            model=model,
            terms=options.losses,
            recipe=options,
            # The same for every method, so that methods are compared on the same draws.
            init=stream_seed(seed, role),
            seed=stream_seed(seed, "learn", role),
            teachers=teachers,
            weights=weights,
            seen=_seen(teachers, ranks[0], eyes, "+".join(given.student.modality)),
            facts={"role": role, "method": method, "seed": seed},
            shaken=generation > 0,
            unlabelled=options.unlabelled if teachers else 0,
            given=given,
        )


def _guides(ranks: Sequence[Sequence[Network]], mode: str) -> tuple[list[Network], list[float]]:
    """Whom the next network learns from, and each one's weight: every rank has the same."""
    chosen = ranks[-1:] if mode == "takd" else ranks
    return (
        [network for rank in chosen for network in rank],
        [1 / len(rank) for rank in chosen for _ in rank],
    )


def _seen(
    teachers: Sequence[Network], first: Sequence[Network], eyes: Sequence[str], own: str
) -> list[str]:
    """What each of these sees: the first rank its own, assistants what the student sees."""
    return [
        next((seen for known, seen in zip(first, eyes) if known is teacher), own)
        for teacher in teachers
    ]


def entry_of(given: Central, number: int) -> Component:
    """A teacher's entry: its checkpoint is the file that its prompts are read by."""
    model, file = given.teachers.models[number], given.teachers.checkpoint_of(number)
    if file is None or "prompts" not in model.options:
        return model
    path = str(Path(file).expanduser().absolute())
    return Component(**{"name": model.name, **model.options, "weights": path})


def _files(config: DistillConfig, images: Images) -> dict[str, str]:
    """Files of weights that the study begins with -> SHA-256."""
    teachers = config.experiment.teachers
    found = {
        file: file_hash(Path(file).expanduser()) for file in filter(None, teachers.checkpoints)
    }
    models = [*teachers.models, config.experiment.student.model]
    models += [m for run in config.runs().values() for m in run.distillation.assistants]
    for model in models:
        try:
            files = files_of(model.name, model.options, images.root)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        found |= {name: file_hash(path) for name, path in files.items()}
    return found


def _read(
    model: Component,
    init: int,
    file: str,
    images: Images,
    where: str,
    knows: tuple[bool, ...] | None = None,
) -> Network:
    try:
        return images.network(model, init, file=Path(file).expanduser(), knows=knows)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
