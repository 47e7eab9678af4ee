"""One network trained from beginning to end, by the one loop, in a folder of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.build import (
    build_domains,
    build_heads,
    build_label_noise,
    build_objective,
    build_optimizer,
    device_named,
    files_root,
)
from fedkd.config import Component, ConfigError, LabelNoise
from fedkd.config import Term as LossTerm
from fedkd.data.datasets import load_dataset
from fedkd.data.domains import Domains
from fedkd.data.heads import Heads
from fedkd.data.images import ImageSet
from fedkd.data.label_noise import with_label_noise
from fedkd.data.labels import class_places
from fedkd.data.pairs import alike, check_classes, pair_rows, stacked
from fedkd.distillation.batches import OnlineBatches, Statistics
from fedkd.distillation.objective import Objective
from fedkd.distillation.trainer import DTYPES, EpochRecord, Snapshot, distill
from fedkd.io.meters import Meter
from fedkd.io.tensors import load_state
from fedkd.models.build import build_model, is_known
from fedkd.models.costs import size_of
from fedkd.models.entries import frozen_of, place_of
from fedkd.models.network import Network
from fedkd.models.noise import add_noise
from fedkd.randomness import stream, stream_seed
from fedkd.rounds import Notify
from fedkd.runs.directory import network_hash, save_state
from fedkd.runs.export import Trained
from fedkd.runs.signature import Pictures
from fedkd.runs.trackers.base import Tracked
from fedkd.runs.tracking import Trackers, flat
from fedkd.studies.central.config import Central, Distillation, DistillConfig, Teachers, Training
from fedkd.studies.central.folder import ROLES, Place
from fedkd.studies.central.noisy import Pair, saved_network
from fedkd.studies.engine import Record, StudyFolder, kind_of
from fedkd.training.evaluation import accuracy, best_temperature, calibration, predict
from fedkd.training.noisy.pair import both_of

_TEST = "experiment.data.test"


# Images that a temperature is found on.
_LEAST, _MOST = 50, 1000


@dataclass(frozen=True)
class Images:
    """What a study trains and tests on.

    Attributes:
        everything: All training images, those in use first; on the CPU.
        train: Training images in use.
        test: Test images, on the device.
        mean: Per-channel mean of the training pixels scaled to [0, 1].
        std: Likewise.
        root: Folder that relative paths of weights start from.
        device: Where networks are trained.
        labelled: How many of `everything` teachers or students see with their labels.
        remarks: What people should know of files of weights that were read.
        modality: What the student sees, where there are pairs.
        sides: Modality -> the same samples as its teachers see them; all with all their images.
        domains: Of the teachers, and of all other images; None where all are of one.
        heads: Of a student with several; images keep the data set's classes.
        dealt: The one that each teacher knows.
        sources: Training images of each source domain, on the CPU.
        source_tests: The test images in each source domain, on the device.
    """

    everything: ImageSet
    train: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    root: Path
    device: torch.device
    labelled: int
    domains: Domains | None = None
    sources: Sequence[ImageSet] = ()
    source_tests: Sequence[ImageSet] = ()
    remarks: list[str] = field(default_factory=list)
    _said: list[str] = field(default_factory=list)
    modality: str = ""
    sides: Mapping[str, Images] = field(default_factory=dict)
    heads: Heads | None = None
    dealt: Sequence[str] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """What a student tells apart: of several heads the classes of all."""
        return self.train.classes if self.heads is None else self.heads.classes

    def of(self, modality: str) -> Images:
        """The same samples as one modality shows them."""
        return self.sides.get(modality, self)

    @classmethod
    def load(cls, given: Central) -> Images:
        """The study's images; a cut takes the same ones for every seed.

        Raises:
            ConfigError: fewer images than asked for, or unlabelled ones.
            FileNotFoundError: images are missing; the message says how to get them.
        """
        data, device = given.data, device_named(given.resources.device)
        if data.pairs:
            return cls._paired(given, device)
        everything, test = load_dataset(data.dataset.name, data.root, **data.dataset.options)
        if data.label_noise is not None:
            everything = _with_noise(everything, data.label_noise, data.root)
        if data.domains is not None:
            domains = build_domains(data.domains, "experiment.data.domains")
            return cls._in_domains(everything, test, given, domains, device)
        everything, test = _shuffled(everything, "train"), _shuffled(test, "test")
        train = _first(everything, data.train, "experiment.data.train")
        test = _first(test, data.test, _TEST)
        teachers = range(len(given.teachers.models))
        labelled = max([len(train), *(given.teachers.train_of(each) or 0 for each in teachers)])
        heads = build_heads(given.student, train.classes, "experiment.student.heads")
        found = cls._of(everything, train, test, files_root(data.root), device, labelled)
        return replace(found, heads=heads, dealt=given.heads)

    @classmethod
    def _of(
        cls,
        everything: ImageSet,
        train: ImageSet,
        test: ImageSet,
        root: Path,
        device: torch.device,
        labelled: int | None = None,
    ) -> Images:
        mean, std = train.statistics()
        if test.labels is None or train.labels is None:
            raise ConfigError("experiment.data.dataset: a study needs labelled images")
        test = ImageSet(test.images.to(device), test.labels.to(device), test.classes)
        labelled = len(train) if labelled is None else labelled
        return cls(everything, train, test, mean, std, root, device, labelled)

    @classmethod
    def _in_domains(
        cls,
        everything: ImageSet,
        test: ImageSet,
        given: Central,
        domains: Domains,
        device: torch.device,
    ) -> Images:
        """Those of domains: a part of the pictures in each, the target's first."""
        data, shifts = given.data, (domains.target, *domains.sources)
        # No picture is in two domains: a student would know its teachers' images by their shapes.
        everyone = [
            _every(_shuffled(domains.shown(everything, shift, "train"), "train"), n, len(shifts))
            for n, shift in enumerate(shifts)
        ]
        tests = [
            _first(_shuffled(domains.shown(test, s, "test"), "test"), data.test, _TEST)
            for s in shifts
        ]
        train = _first(everyone[0], data.train, "experiment.data.train")
        target = cls._of(everyone[0], train, tests[0], files_root(data.root), device)
        others = [
            replace(images, images=images.images.to(device), labels=_labels(images).to(device))
            for images in tests[1:]
        ]
        return replace(target, domains=domains, sources=everyone[1:], source_tests=others)

    @classmethod
    def _paired(cls, given: Central, device: torch.device) -> Images:
        """Those of pairs: the first ones of each side are the pairs in use."""
        data, student = given.data, given.student.modality
        loaded = {
            name: load_dataset(side.name, data.root, **side.options)
            for name, side in data.pairs.items()
        }
        trains = {name: train for name, (train, _) in loaded.items()}
        first = student[0]
        test = _first(_shuffled(loaded[first][1], "test"), data.test, _TEST)
        count = data.train or min(map(len, trains.values()))
        sides: dict[str, Images] = {}
        root, remarks, said = files_root(data.root), list[str](), list[str]()
        try:
            check_classes(trains)
            rows = pair_rows(trains, first, data.by, count, seed=0)
            for name, train in trains.items():
                rest = torch.ones(len(train), dtype=torch.bool)
                rest[rows[name]] = False
                unpaired = _shuffled(train.subset(rest.nonzero().flatten()), "train")
                pairs = train.subset(rows[name])
                everything = replace(
                    pairs,
                    images=torch.cat([pairs.images, unpaired.images]),
                    labels=torch.cat([_labels(pairs), _labels(unpaired)]),
                    groups=None,
                )
                tests = test if name == first else alike(test, loaded[name][1], f"{name}: test")
                side = cls._of(everything, pairs, tests, root, device)
                sides[name] = replace(side, modality=name, remarks=remarks, _said=said)
        except ValueError as error:
            raise ConfigError(f"experiment.data.pairs: {error}") from None
        main = sides[first]
        if len(student) > 1:
            pairs = stacked([sides[name].train for name in student])
            tests = stacked(
                [replace(sides[n].test, images=sides[n].test.images.cpu()) for n in student]
            )
            main = cls._of(pairs, pairs, tests, root, device)
        return replace(main, modality="+".join(student), sides=sides, remarks=remarks, _said=said)

    def for_teacher(self, number: int, count: int | None, where: str) -> ImageSet:
        """What a teacher is trained on: so many images of its domain.

        Args:
            number: The teacher's.
            count: How many; None: as many as are in use, or all of a source domain.
            where: The key that has the count.

        Raises:
            ConfigError: there are fewer.
        """
        if self.domains is None:
            return self.train if count is None else _first(self.everything, count, where)
        return _first(self.sources[self.domains.number_of(number)], count, where)

    def for_student(self, images: ImageSet, *, baseline: bool) -> ImageSet:
        """Of these training images: without labels where they are of the target domain."""
        return images if self.domains is None or baseline else images.unlabelled()

    def on_sources(self, network: Network) -> dict[str, float]:
        """Accuracy on the test images in each source domain; nothing without domains."""
        shifts = () if self.domains is None else self.domains.sources
        return {
            str(shift): self.accuracy(network, test)
            for shift, test in zip(shifts, self.source_tests, strict=True)
        }

    def unlabelled(self, count: int) -> Tensor | None:
        """So many images that nobody saw with their labels; None of none.

        Raises:
            ConfigError: there are fewer.
        """
        left = self.everything.images[self.labelled :]
        if count > len(left):
            raise ConfigError(
                f"distillation.unlabelled: {count} images are asked for, {len(left)} are left "
                "beside those that teachers or students see with their labels"
            )
        return left[:count] if count else None

    def known(self, teachers: Teachers, number: int) -> tuple[bool, ...] | None:
        """Which of the classes a teacher knows; None: all. Raises `ConfigError`."""
        if self.heads is not None:
            return self.heads.knows(self.dealt[number])
        if (known := teachers.classes) is None:
            return None
        try:
            where = f"experiment.teachers.classes.{number}"
            return class_places(known[number], self.train.classes, where)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def left_over(self, unlabelled: int) -> ImageSet | None:
        """Labelled training images that nobody learns from; None where there are too few.

        Args:
            unlabelled: How many of the others students see without their labels.
        """
        whole = self.domains is None and self.heads is None and not self.modality
        rows = torch.arange(self.labelled + unlabelled, len(self.everything))[:_MOST]
        if not whole or self.everything.true_labels is not None or len(rows) < _LEAST:
            return None
        return self.everything.subset(rows)

    def network(
        self,
        model: Component,
        seed: int,
        *,
        load: bool = True,
        file: Path | None = None,
        knows: tuple[bool, ...] | None = None,
    ) -> Network:
        """A fresh network on the device: from its file, if the entry names one.

        Args:
            model: Its entry.
            seed: Of the weights that are not in a file.
            load: Whether the file is read.
            file: Another file, in which all of it must be.
            knows: Which of the classes it tells apart; None: all.

        Raises:
            ConfigError: it cannot take the images, or the file does not fit.
        """
        classes = self.classes
        if knows is not None:
            classes = tuple(compress(classes, knows))
        try:
            network = build_model(
                model.name,
                num_classes=len(classes),
                in_channels=self.train.shape[0],
                image_size=self.train.side,
                mean=self.mean,
                std=self.std,
                seed=seed,
                options=model.options,
                file=place_of(model.name, model.options, self.root)
                if load and file is None
                else file,
                root=self.root,
                classes=classes,
                whole=file is not None,
                notify=self._note,
                public=self.train.images,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        network.knows = knows
        return network.to(self.device)

    def told(self, notify: Notify) -> None:
        """Say the remarks, once each."""
        for text in self.remarks:
            if text not in self._said:
                self._said.append(text)
                notify("warning", text=text)

    def _note(self, remark: str) -> None:
        if remark not in self.remarks:
            self.remarks.append(remark)

    @torch.no_grad()
    def accuracy(
        self,
        network: Network,
        test: ImageSet | None = None,
        batch_size: int = 500,
        only: Collection[str] | None = None,
    ) -> float:
        """Share of test images that `network` names rightly; its mode is kept.

        Of several heads, the mean over those that it knows, or over `only` some.
        """
        test = self.test if test is None else test
        assert test.labels is not None
        if self.heads is not None:
            return statistics.fmean(self.by_head(network, only).values())
        numbers = torch.arange(len(test.classes), device=self.device)
        if network.knows is not None:
            numbers = numbers[torch.tensor(network.knows, device=self.device)]
        mode = network.training
        network.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in zip(
            test.images.split(batch_size), test.labels.split(batch_size), strict=True
        ):
            right += (numbers[network.read(images).logits.argmax(dim=1)] == labels).sum()
        network.train(mode)
        return int(right) / len(test)

    def by_head(self, network: Network, only: Collection[str] | None = None) -> dict[str, float]:
        """Accuracy of the heads that a network knows, or of some of them; its mode is kept."""
        if self.heads is None:
            return {}
        mode, knows, test = network.training, network.knows, self.test
        logits = predict(network.eval(), test.images)
        network.train(mode)
        if knows is not None:
            whole = torch.full((len(logits), len(knows)), -torch.inf)
            whole[:, torch.tensor(knows)] = logits
            logits = whole
        assert test.labels is not None
        return {
            head: accuracy(*self.heads.questions(logits, test.labels.cpu(), [head]))
            for head, span in self.heads.spans.items()
            if (knows is None or knows[span.start]) and (only is None or head in only)
        }


def _labels(images: ImageSet) -> torch.Tensor:
    assert images.labels is not None
    return images.labels


def _with_noise(images: ImageSet, section: LabelNoise, root: str | None) -> ImageSet:
    """With wrong labels, the same ones for every seed. Raises `ConfigError`."""
    noise = build_label_noise(section, "experiment.data.label_noise", root)
    try:
        return with_label_noise(images, [np.arange(len(images))], noise, seed=0)
    except ValueError as error:
        raise ConfigError(f"experiment.data: {error}") from None


def ensemble_accuracy(
    networks: Sequence[Network], images: Images, only: Collection[str] | None = None
) -> float:
    """Share of the test images that the mean of the networks' probabilities names rightly.

    Of several heads, the mean over all, or over `only` some.
    """
    assert images.test.labels is not None
    answers = torch.stack([predict(network, images.test.images) for network in networks])
    if images.heads is not None:
        each = [images.heads.questions(own, images.test.labels.cpu(), only) for own in answers]
        return accuracy(torch.stack([own for own, _ in each]).softmax(dim=-1).mean(0), each[0][1])
    return accuracy(answers.softmax(dim=-1).mean(dim=0), images.test.labels.cpu())


def _shuffled(images: ImageSet, name: str) -> ImageSet:
    """In an order that is the same for every seed."""
    return images.subset(torch.randperm(len(images), generator=stream(0, "study", name)))


def _every(images: ImageSet, first: int, step: int) -> ImageSet:
    return images.subset(torch.arange(first, len(images), step))


def _first(images: ImageSet, count: int | None, where: str) -> ImageSet:
    if count is None:
        return images
    if count > len(images):
        raise ConfigError(f"{where}: {count} images are asked for, there are {len(images)}")
    return images.subset(torch.arange(count))


@dataclass(frozen=True)
class Task:
    """One network to train.

    Attributes:
        label: What people call it ("dkd, seed 0").
        place: Its folder.
        model: Its architecture.
        terms: Its objective.
        recipe: How it is trained.
        init: Seed of its weights.
        seed: Seed of order, augmentation and everything else.
        teachers: Whom it learns from, in evaluation mode on the device.
        weights: Of the teachers; default: all the same.
        images: What it learns from; default: the study's training images.
        facts: Written into its results.
        answers: What teachers have answered once and for all, kept from task to task.
        knows: Which of the classes it knows; None: all.
        shaken: Whether it is a student, which the recipe's noise is for.
        unlabelled: How many images beside those, whose classes the teachers name.
        study: What the study calls itself.
        given: Its config for this network.
        seen: Modality of each teacher; empty where all see what the network sees.
    """

    label: str
    place: Place
    model: Component
    terms: Sequence[LossTerm]
    recipe: Training
    init: int
    seed: int
    teachers: Sequence[Network] = ()
    weights: Sequence[float] | None = None
    images: ImageSet | None = None
    facts: Record = field(default_factory=dict)
    answers: Statistics | None = None
    knows: tuple[bool, ...] | None = None
    shaken: bool = False
    unlabelled: int = 0
    study: str = ""
    given: Central | None = None

    def network(self, images: Images, *, load: bool = True) -> Network:
        """It, untrained. Raises `ConfigError` if it cannot take the images or the noise."""
        network = images.network(self.model, self.init, load=load, knows=self.knows)
        if self.shaken and isinstance(self.recipe, Distillation):
            try:
                add_noise(network, self.model.name, **self.recipe.noise.model_dump())
            except ValueError as error:
                raise ConfigError(f"distillation.{error}") from None
        return network

    seen: Sequence[str] = ()

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that its losses teach."""
        return tuple(dict.fromkeys(term.head for term in self.terms if term.head is not None))

    def objective(self, images: Images) -> Objective:
        """What it minimises."""
        objective = build_objective(self.terms)
        objective.heads = images.heads
        return objective

    def pair(self, images: Images) -> Pair:
        """Its untrained networks, where labels are noisy. Raises `ConfigError`."""
        assert self.recipe.noisy is not None
        role = self.place.role
        return Pair.of(self.recipe.noisy, self.model, images.network, self.init, role)

    def batches(self, images: Images, objective: Objective, some: ImageSet) -> OnlineBatches:
        """Batches of `some` images, the first in use, with the teachers' answers."""
        recipe = self.recipe
        sides = {name: images.of(name).train.images[: len(some)] for name in set(self.seen)}
        others = [sides[name] if name != images.modality else None for name in self.seen]
        return OnlineBatches(
            some,
            self.teachers,
            objective.needs if self.teachers else (),
            augment=recipe.augment,
            virtual=recipe.virtual,
            batch_size=recipe.batch_size,
            seed=stream_seed(self.seed, "lessons"),
            device=images.device,
            weights=self.weights,
            autocast=DTYPES[recipe.precision],
            memory_format=_layout(recipe),
            # What they found about other images is not about these.
            known=None if self.unlabelled else self.answers,
            clean=isinstance(recipe, Distillation) and recipe.teachers_see == "clean",
            unlabelled=images.unlabelled(self.unlabelled),
            others=others,
            heads=images.heads if self.heads else None,
        )


def train(task: Task, images: Images, notify: Notify) -> Network:
    """Train a network, or go on with it, or take it from its folder if it is finished.

    Raises:
        ConfigError: the losses do not fit student and teachers.
        RuntimeError: the loss is no longer finite.
    """
    recipe, place = task.recipe, task.place
    result = place.result()
    frozen = "peft" in task.model.options  # is not among what was saved
    pair = None if recipe.noisy is None else task.pair(images)
    fresh = result is None or frozen
    network = task.network(images, load=fresh) if pair is None else pair.network
    notify("training", label=task.label, epochs=recipe.epochs)
    if result is not None:
        network.load_state_dict(load_state(place.weights)["weights"])
        notify("trained", label=task.label, **result)
        return network.eval()
    for each in (network, *task.teachers):
        each.to(memory_format=_layout(recipe))  # type: ignore[call-overload]
    objective = task.objective(images)
    if recipe.compile:
        torch.compiler.reset()  # all networks share one cache, of which eight entries are kept
        for each in (network, *task.teachers):
            each.compile_reading()
    state = place.begin()
    shard = task.images or images.train
    with _trackers(task, state, notify) as trackers:
        diary = _Diary(task, images, network, notify, trackers)
        try:
            if pair is not None:
                pair.fit(
                    shard,
                    images.test,
                    recipe,
                    role=place.role,
                    seed=task.seed,
                    state=state,
                    on_epoch=diary,
                )
            else:
                distill(
                    network,
                    task.batches(images, objective, shard),
                    objective,
                    epochs=recipe.epochs,
                    optimizer=build_optimizer(recipe.optimizer),
                    resume=state,
                    precision=recipe.precision,
                    seed=task.seed,
                    on_epoch=diary,
                )
        except ValueError as error:
            raise ConfigError(f"{task.label}: {error}") from None
        keep(network, task, images)
        result = diary.result()
        place.finish(result)
        final = {f"final/{key}": result[key] for key in ("last", "best", "seconds", "joules")}
        trackers.finish(final, [place.path / name for name in ("results.json", "settings.json")])
    notify("trained", label=task.label, **result)
    return network


def _trackers(task: Task, state: Record | None, notify: Notify) -> Trackers:
    """Those that hear of this training: each is a run of its own for them."""
    given, path = task.given, task.place.path
    home = _study_of(path) or path.parent
    about = Tracked(
        identity="-".join((home.name, *path.relative_to(home).parts)),
        folder=path,
        name=task.study or home.name,
        parameters={"label": task.label}
        | ({} if given is None else flat(given.model_dump(mode="json", exclude={"track"}))),
        steps={"round": 0, "epoch": 0 if state is None else state["epoch"]},
    )
    chosen = () if given is None else given.track
    return Trackers(chosen, about, lambda text: notify("warning", text=text))


def keep(network: Network, task: Task, images: Images) -> None:
    """Write the network to its folder, with what is needed to build it again."""
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    noisy = task.recipe.noisy if both_of(network) is not None else None
    about = {
        "model": task.model.name,
        "options": task.model.options,
        "noisy": noisy and noisy.model_dump(mode="json"),
        "classes": list(
            images.classes if task.knows is None else compress(images.classes, task.knows)
        ),
        "image": list(images.train.shape),
    }
    if images.heads is not None and task.knows is None:
        about["heads"] = images.heads.sizes
    if images.modality:
        about["modality"] = images.modality
        names = images.modality.split("+")
        about["together"] = {n: list(images.of(n).train.shape) for n in names if len(names) > 1}
    save_state(task.place.weights, {**about, "weights": weights})


def trained_in(path: Path) -> list[Path]:
    """Folders of all finished students of a study, those of a method together."""
    return sorted(file.parent for file in path.glob("methods/*/seed*/student.pt"))


def load_trained(path: Path, *, trust: bool = False) -> Trained:
    """What was trained in a folder of a study: a student, a teacher or an assistant.

    Needs no data set. A study's own folder will do if it has one student.

    Raises:
        ConfigError: it is not there, there are several, or the file is damaged.
    """
    path = path.expanduser().resolve()
    if kind_of(path) == "distill":
        found = trained_in(path)
        if len(found) != 1:
            one = found[0] if found else path / "methods" / "METHOD" / "seed0"
            raise ConfigError(
                f"{path} is a study with {len(found)} finished students: name the folder of one, "
                f"e.g. {one}"
            )
        (path,) = found
    network, saved = _built(path, trust)
    classes = tuple(map(str, saved["classes"]))
    channels, height, width = saved["image"]
    shape = (channels, height, width)
    about = {
        "student": {"name": saved["model"], **saved["options"]},
        "classes": classes,
        "pictures": Pictures(channels=channels, height=height, width=width).model_dump(),
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "heads": saved.get("heads", {}),
    }

    role = next(role for role in ROLES if (path / f"{role}.pt").is_file())
    result = Place(path, role).result() or {}
    if result.get("hash") != network_hash(network):  # of another training
        result = {}
    temperature = float(result.get("temperature", {}).get("value", 1.0))
    about["temperature"] = temperature

    def images() -> Images:
        study = _study_of(path)
        if study is None:
            raise ConfigError("the study's config.yaml is not there")
        found = Images.load(StudyFolder.open(study, DistillConfig).config.experiment)
        modality = str(saved.get("modality", ""))
        if modality != found.modality:
            found = found.of(modality)
        if not set(classes) <= set(found.classes) or found.test.shape != shape:
            raise ConfigError("the data set has other classes, or images of another shape, today")
        return found

    def test() -> ImageSet:
        data = images()
        found = data.test
        assert found.labels is not None
        if data.heads is not None:
            if saved.get("heads"):
                return found  # of all heads: what is judged by one class of it is refused
            name = classes[0].split(":")[0]
            return data.heads.labelled(found, name).among(data.heads.knows(name))
        # Of the classes that it knows: a specialist's are some of the study's.
        own = torch.tensor([classes.index(c) if c in classes else -1 for c in found.classes])
        labels = own[found.labels.cpu()]
        rows = (labels >= 0).nonzero().flatten()
        return ImageSet(found.images.cpu()[rows], labels[rows], classes)

    return Trained(
        network.eval(),
        classes,
        shape,
        about,
        path,
        test,
        lambda: images().train.images.cpu(),
        {str(n): (c, h, w) for n, (c, h, w) in saved.get("together", {}).items()},
        {str(head): int(count) for head, count in saved.get("heads", {}).items()},
        temperature,
    )


def _built(path: Path, trust: bool) -> tuple[Network, dict[str, Any]]:
    """The network in a training's folder, and what was written beside its weights."""
    file = next((f for role in ROLES if (f := path / f"{role}.pt").is_file()), None)
    if file is None:
        raise ConfigError(f"{path} has no finished student")
    try:
        saved = load_state(file)
        channels, height, _ = saved["image"]
        if not is_known(saved["model"]) and (study := _study_of(path)):
            StudyFolder.open(study, DistillConfig, trust=trust).import_plugins()
        network = saved_network(
            saved,
            lambda model, seed: build_model(
                model.name,
                num_classes=len(saved["classes"]),
                in_channels=channels,
                image_size=height,
                mean=[0.0] * channels,
                std=[1.0] * channels,
                seed=seed,
                options=model.options,
                file=frozen_of(model.name, model.options, files_root(None)),
                root=files_root(None),
                public=torch.empty(0, *saved["image"], dtype=torch.uint8),
            ),
        )
        network.load_state_dict(saved["weights"])
    except ConfigError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{file} cannot be used ({type(error).__name__}: {reason})") from None
    return network, saved


def _study_of(path: Path) -> Path | None:
    """The study that a training's folder belongs to; None if it was taken out of it."""
    return next((above for above in path.parents[:4] if kind_of(above) == "distill"), None)


def domain_record(network: Network, images: Images) -> Record:
    """The accuracies in source domains for a record; nothing without domains."""
    return {} if images.domains is None else {"sources": images.on_sources(network)}


def _calibrated(network: Network, task: Task, images: Images) -> Record:
    """How far a student's confidence is off, and what makes it right where images are left over."""
    if task.place.role != "student" or images.heads is not None:
        return {}
    mode, test = network.training, images.test
    assert test.labels is not None
    logits, labels = predict(network.eval(), test.images), test.labels.cpu()
    found: Record = {"ece": calibration(logits, labels).ece}
    if (left := images.left_over(task.unlabelled)) is not None:
        value = best_temperature(predict(network, left.images), _labels(left))
        after = calibration(logits / value, labels).ece
        found["temperature"] = {"value": value, "images": len(left), "ece": after}
    network.train(mode)
    return found


_MEASURED = ("seconds", "joules", "images_per_second")


class _Diary:
    """Receives every epoch: tests, writes down, keeps checkpoints."""

    def __init__(
        self, task: Task, images: Images, network: Network, notify: Notify, trackers: Trackers
    ) -> None:
        self._task = task
        self._trackers = trackers
        self._images = images
        self._network = network
        self._notify = notify
        self._learnt = task.images or images.train
        self._count = len(self._learnt) + task.unlabelled
        self._begin()

    def __call__(
        self,
        record: EpochRecord,
        snapshot: Callable[[], dict[str, Any]],
        *,
        accuracy: float | None = None,
        noisy: Record | None = None,
    ) -> None:
        meter = self._meter
        meter.stop()
        recipe = self._task.recipe
        tested = record.epoch % recipe.test_every == 0 or record.epoch == recipe.epochs
        if tested and noisy is None:
            accuracy = self._images.accuracy(self._network, only=self._task.heads or None)
        facts = {
            **asdict(record),
            "accuracy": accuracy,
            "seconds": meter.seconds,
            "joules": meter.joules,
            "memory": meter.memory,
            "gpu_memory": meter.gpu_memory,
            "images_per_second": self._count / meter.seconds,
        }
        self._task.place.add_epoch(facts if noisy is None else {**facts, "noisy": noisy})
        heard = {key: facts.get(key) for key in ("loss", "lr", "accuracy", *_MEASURED)}
        numbers = {f"epoch/{key}": value for key, value in {**heard, **record.terms}.items()}
        self._trackers.log("epoch", record.epoch, numbers)
        due = record.epoch % recipe.checkpoint_every == 0 and record.epoch < recipe.epochs
        if due:
            self._keep(snapshot)
        try:
            self._notify("epoch", label=self._task.label, epochs=recipe.epochs, **facts)
        except BaseException:  # whoever listens wants to stop here: nothing shall be lost
            if not due:
                self._keep(snapshot)
            raise
        self._begin()

    def _begin(self) -> None:
        self._meter = Meter(gpus=self._images.device.type == "cuda")
        self._meter.start()

    def _keep(self, snapshot: Snapshot) -> None:
        save_state(self._task.place.checkpoint, snapshot())

    def result(self) -> Record:
        """What came out, from the record of all epochs (also those before an interruption)."""
        epochs = self._task.place.epochs()
        best = max((e for e in epochs if e["accuracy"] is not None), key=lambda e: e["accuracy"])
        wrong = self._learnt.wrong_labels
        heads = self._images.by_head(self._network, self._task.heads or None)
        size = size_of(self._network, self._images.train.shape)
        calibrated = _calibrated(self._network, self._task, self._images)
        joules = [e.get("joules") for e in epochs]
        peaks = {key: [e[key] for e in epochs if e.get(key)] for key in ("memory", "gpu_memory")}
        return {
            **self._task.facts,
            **({} if wrong is None else {"wrong_labels": wrong}),
            **domain_record(self._network, self._images),
            **({"heads": heads} if heads else {}),
            **calibrated,
            "model": self._task.model.name,
            **size.facts,
            "epochs": len(epochs),
            "last": epochs[-1]["accuracy"],
            "best": best["accuracy"],
            "best_epoch": best["epoch"],
            "seconds": sum(e["seconds"] for e in epochs),
            "joules": None if None in joules else sum(joules),
            **{key: max(values, default=None) for key, values in peaks.items()},
            # The first epoch also warms up caches and compilers.
            "images_per_second": statistics.median(e["images_per_second"] for e in epochs),
            "hash": network_hash(self._network),
        }


def _layout(recipe: Training) -> torch.memory_format:
    return torch.channels_last if recipe.channels_last else torch.contiguous_format
