"""What a run's or a study's students have taken over, measured and written down.

properties.json  properties.html   beside the run or study
inspect/                           independent students that were trained for it
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.config import ConfigError
from fedkd.rounds import Notify, computing, silent
from fedkd.runs.directory import RunDirectory, versions, write_json
from fedkd.studies.inspection.subjects import Subjects, Trial, of_run, of_study
from fedkd.training.evaluation import accuracy
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Scene
from fedkd.training.properties.bias import by_group
from fedkd.training.properties.compare import Comparison, Inspection, chosen, compare, verdict
from fedkd.training.properties.readers import NotMeasured, Reader

PROPERTIES_FILE = "properties.json"

Facts = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        what: Names of properties, or "all".
        images: Test images looked at, at most.
        triplets: Planes through three of them.
        groups: `.npz` file with an array `group`, one entry for each test image.
        marker: Class that a marker is asked for, by name or number.
        command: What was typed, for the page; "" from Python.
    """

    what: str = "all"
    images: int = 500
    triplets: int = 50
    groups: Path | None = None
    marker: str | None = None
    command: str = ""

    def check(self) -> None:
        """Raise `ConfigError` for what is wrong before anything is loaded."""
        for name, value in (("--images", self.images), ("--triplets", self.triplets)):
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        try:
            chosen(self.what)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        if self.groups is not None and not self.groups.is_file():
            raise ConfigError(f"--groups: there is no file {self.groups}")


def inspect_run(run: RunDirectory, options: Options, notify: Notify = silent) -> Facts:
    """Measure a run's student. Raises `ConfigError`."""
    options.check()
    return _computed(of_run(run, options.images, notify), run.path, options, notify)


def inspect_study(
    path: Path, options: Options, notify: Notify = silent, *, trust: bool = False
) -> Facts:
    """Measure the students of a study of methods. Raises `ConfigError`."""
    options.check()
    path = path.expanduser().resolve()
    return _computed(of_study(path, options.images, notify, trust=trust), path, options, notify)


def _computed(subjects: Subjects, folder: Path, options: Options, notify: Notify) -> Facts:
    """With the threads of the config: sums depend on their number."""
    with computing(subjects.resources, subjects.resources.server_threads):
        return _inspected(subjects, folder, options, notify)


def _inspected(subjects: Subjects, folder: Path, options: Options, notify: Notify) -> Facts:
    since = time.perf_counter()
    scene = _scene(subjects, options)
    names = chosen(options.what)
    inspections: dict[str, list[Inspection]] = {}
    jobs = [(trial, method) for trial in subjects.trials for method in trial.distilled]
    teachers = subjects.trials[0].teachers
    likeness = [name for name in names if PROPERTIES.create(name).likeness]
    total, done = len(names) * len(jobs) + len(likeness) * len(teachers), 0

    def on_property(name: str) -> None:
        nonlocal done
        notify("property", label=name, done=done, total=total)
        done += 1

    for trial, method in jobs:
        case = _case(trial, scene)
        try:
            found = compare(
                case, trial.distilled[method], trial.alone, names, on_property=on_property
            )
        except ValueError as error:
            raise ConfigError(f"{folder}: {error}") from None
        inspections.setdefault(method, []).append(found)
    facts: Facts = {
        "name": subjects.name,
        "kind": subjects.kind,
        "about": subjects.about,
        "notes": list(subjects.notes),
        "seeds": [trial.seed for trial in subjects.trials],
        "images": len(subjects.images),
        "triplets": options.triplets,
        "classes": list(subjects.images.classes),
        "methods": list(inspections),
        "stand_in": _name(subjects.trials[0].gradients),
        "accuracy": _accuracies(subjects, scene),
        "properties": _properties(names, inspections),
        "left_out": _left_out(inspections),
        "by_teacher": _by_teacher(subjects.trials[0], scene, likeness, on_property),
        "groups": _groups(subjects, scene),
        "clients": _by_client(subjects, scene),
        "versions": versions(),
    }
    facts["seconds"] = time.perf_counter() - since
    write_json(folder / PROPERTIES_FILE, _plain(facts))
    notify("phase", phase="report")
    from fedkd.studies.inspection.report import write_page

    write_page(folder, {**facts, "command": options.command}, subjects, scene)
    return facts


def _case(trial: Trial, scene: Scene) -> Case:
    unrelated = trial.alone[1] if len(trial.alone) > 1 else None
    return Case(scene, trial.teacher, trial.alone[0], trial.gradients, unrelated, trial.why)


def _name(reader: Reader | None) -> str | None:
    return None if reader is None else reader.name


def _scene(subjects: Subjects, options: Options) -> Scene:
    groups, names = _read_groups(options.groups, subjects)
    return Scene(
        subjects.images,
        triplets=options.triplets,
        groups=groups,
        group_names=names,
        marker=_marker(options.marker, subjects.images.classes),
    )


def _marker(given: str | None, classes: Sequence[str]) -> int | None:
    if given is None:
        return None
    if given in classes:
        return list(classes).index(given)
    if given.isdecimal() and int(given) < len(classes):
        return int(given)
    raise ConfigError(
        f"--marker: expected the class that the marker asks for, got {given!r} "
        f"(classes: {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''})"
    )


def _read_groups(file: Path | None, subjects: Subjects) -> tuple[Tensor | None, tuple[str, ...]]:
    """The group of each image, and the groups' names."""
    if file is None:
        return None, ()
    try:
        with np.load(file, allow_pickle=False) as arrays:
            given = arrays["group"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--groups: {file}: expected an .npz file with an array 'group' ({error})"
        ) from None
    if given.shape != (subjects.total,):
        raise ConfigError(
            f"--groups: {file}: expected one group for each of the {subjects.total} test images, "
            f"in the order in which the run or study has them, got {given.shape}"
        )
    names, numbers = np.unique(given, return_inverse=True)
    return torch.from_numpy(numbers)[subjects.rows], tuple(map(str, names))


def _accuracies(subjects: Subjects, scene: Scene) -> Facts:
    """Mean over the seeds: of teacher, each method's student, and the independent ones."""

    def of(readers: Sequence[Reader | None]) -> float | None:
        known = [r for r in readers if r is not None]
        if not known:
            return None
        return statistics.fmean(accuracy(scene.clean(r), scene.labels) for r in known)

    trials = subjects.trials
    return {
        "teacher": of([trial.teacher for trial in trials]),
        "methods": {
            name: of([trial.distilled[name] for trial in trials]) for name in trials[0].distilled
        },
        "alone": of([trial.alone[0] for trial in trials]),
    }


def _properties(names: Sequence[str], found: Mapping[str, Sequence[Inspection]]) -> Facts:
    facts: Facts = {}
    for name in names:
        rows = {}
        for method, inspections in found.items():
            seeds = [i.properties[name] for i in inspections if name in i.properties]
            if seeds:
                rows[method] = _row(seeds)
        if rows:
            about = PROPERTIES.create(name)
            facts[name] = {
                "title": about.title,
                "question": about.question,
                "likeness": about.likeness,
                "percent": about.percent,
                "chance": about.chance,
                "methods": rows,
            }
    return facts


def _row(seeds: Sequence[Comparison]) -> Facts:
    """One property of one method: means over the seeds."""
    differences = [each.difference for each in seeds if math.isfinite(each.difference)]
    mean = {
        key: _mean([getattr(each, key) for each in seeds])
        for key in ("teacher", "student", "alone", "difference", "spread")
    }
    error = None
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        **mean,
        "control": [_mean(list(each)) for each in zip(*(one.control for one in seeds))],
        "error": error,
        "verdict": verdict(
            mean["difference"],
            mean["spread"],
            seeds[0].likeness,
            mean["teacher"],
            mean["alone"],
        ),
        "count": round(statistics.fmean(each.count for each in seeds)),
        "parts": dict(seeds[0].parts),
        "seeds": [
            {"teacher": each.teacher, "student": each.student, "alone": each.alone,
             "control": list(each.control)}
            for each in seeds
        ],
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def _left_out(found: Mapping[str, Sequence[Inspection]]) -> dict[str, str]:
    return {
        name: reason
        for inspections in found.values()
        for each in inspections
        for name, reason in each.left_out.items()
    }


def _by_teacher(trial: Trial, scene: Scene, names: Sequence[str], on_property: Any) -> Facts:
    """Teacher -> property -> what the first method's student has of it, and an independent one."""
    facts: Facts = {}
    student = next(iter(trial.distilled.values()))
    for name, teacher in trial.teachers.items():
        case = Case(
            scene, teacher, trial.alone[0], None, None, "the teacher stayed with its client"
        )
        found = compare(case, student, trial.alone, names, on_property=on_property)
        if found.properties:
            facts[name] = {
                key: {"student": each.student, "alone": each.alone, "spread": each.spread,
                      "verdict": each.verdict}
                for key, each in found.properties.items()
            }  # fmt: skip
    return facts


def _groups(subjects: Subjects, scene: Scene) -> Facts:
    """Accuracy per class or group of the first seed: teacher, methods, independent."""
    trial = subjects.trials[0]
    readers = {"teacher": trial.teacher, **trial.distilled, "alone": trial.alone[0]}
    try:
        rows = {
            name: by_group(reader, scene).tolist()
            for name, reader in readers.items()
            if reader is not None
        }
    except NotMeasured:
        return {}
    given = scene.groups is not None
    names = scene.group_names if given else subjects.images.classes
    return {"of": "group" if given else "class", "names": list(names), "accuracies": rows}


def _by_client(subjects: Subjects, scene: Scene) -> list[Facts]:
    """What the student gained over the independent ones on each client's classes."""
    if not subjects.clients:
        return []
    trial = subjects.trials[0]
    whole = Scene(subjects.images)
    student, *alone = (
        by_group(each, whole).nan_to_num(0)
        for each in (next(iter(trial.distilled.values())), *trial.alone)
    )
    rows = []
    for client, about in subjects.clients.items():
        counts = torch.tensor(about["counts"], dtype=torch.double)
        part = counts / counts.sum()
        first = float(part @ alone[0])
        rows.append(
            {
                "client": client,
                "images": int(counts.sum()),
                "share": about["share"],
                "gain": float(part @ student) - first,
                "spread": max((abs(float(part @ each) - first) for each in alone[1:]), default=0.0),
            }
        )
    return rows


def _plain(value: Any) -> Any:
    """With nothing that JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
