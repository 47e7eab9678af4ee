"""Folders of one study whose cells were run apart, as one folder with one page."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd.config import ConfigError
from fedkd.io.records import read_json
from fedkd.runs.directory import begin_folder, write_json
from fedkd.runs.signature import IMAGES
from fedkd.studies.config import StudyConfig
from fedkd.studies.engine import REPORT, RESULTS, Cell, Study, StudyFolder

AnyFolder = StudyFolder[Any]

# Files of the whole study, which the merged one has anew.
_OWN = ("config.yaml", "versions.json", IMAGES, RESULTS, REPORT, ".lock")


@dataclass(frozen=True)
class Merged:
    """What came of it.

    Attributes:
        study: The study of all cells.
        folder: Its folder.
        notes: What a reader of the results should know.
    """

    study: Study[Any, Any]
    folder: AnyFolder
    notes: tuple[str, ...]


def merge(
    kind: type[Study[Any, Any]], paths: Sequence[Path], into: Path, *, trust: bool = False
) -> Merged:
    """Copy the cells of several folders into a new one.

    The folders' configs are alike in all but `seeds`, `only`, names and places, and the machine.

    Args:
        kind: Of the study.
        paths: The folders; nothing in them is changed.
        into: The new folder.
        trust: Import the plugins that the configs name: they are code.

    Raises:
        ConfigError: a folder is none of this kind, or another process runs cells in it; configs or
            images differ; two folders have finished the same cell; `into` is there.
    """
    if len(paths) < 2:
        raise ConfigError("merge: give two folders of a study or more")
    if into.exists():
        raise ConfigError(f"--into: {into} is there already; name a new folder")
    folders = [StudyFolder.open(path, kind.config_class, trust=trust) for path in paths]
    if len({folder.path for folder in folders}) < len(folders):
        raise ConfigError("merge: a folder is given twice")
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(folder.lock)
        study = kind(_common(folders))
        owners = _owners(study, folders)
        images = _images(folders)
        notes = _notes(folders)
        whole: AnyFolder = StudyFolder(begin_folder(into, study.config, "--into"), study.config)
        write_json(whole.path / IMAGES, images)
        for folder in folders:
            _copy(folder, whole, owners)
    return Merged(study, whole, notes)


def _common(folders: Sequence[AnyFolder]) -> StudyConfig:
    """The config of all cells. Raises `ConfigError` that names the first key that differs."""
    first, *others = folders
    for other in others:
        key, ours, theirs = _difference(_compared(first.config), _compared(other.config))
        if key:
            raise ConfigError(
                f"{other.path}: {key} is {theirs!r}, in {first.path} it is {ours!r}; only studies "
                "of one config can be merged (seeds and only may differ)"
            )
    seeds = sorted({seed for folder in folders for seed in folder.config.seeds})
    values: dict[str, Any] = {"seeds": seeds}
    if "only" in type(first.config).model_fields:
        rows = [folder.config.only for folder in folders]
        values["only"] = None if None in rows else list(dict.fromkeys(sum(rows, ())))
    return type(first.config).model_validate({**first.config.model_dump(mode="json"), **values})


def _compared(config: StudyConfig) -> dict[str, Any]:
    """What has to be alike."""
    values = config.model_dump(mode="json", exclude={"name", "output", "seeds", "only"})
    experiment = values["experiment"]
    for key in ("name", "output", "seed"):
        experiment.pop(key, None)
    for key in ("ray_address", "total_cpus", "energy", "device"):
        experiment.get("resources", {}).pop(key, None)
    return values


def _difference(ours: Any, theirs: Any, key: str = "") -> tuple[str, Any, Any]:
    """The first dotted key at which two configs differ, and what they have there."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            place = f"{key}.{name}" if key else str(name)
            found = _difference(ours.get(name), theirs.get(name), place)
            if found[0]:
                return found
        return "", None, None
    return ("", None, None) if ours == theirs else (key, ours, theirs)


def _owners(study: Study[Any, Any], folders: Sequence[AnyFolder]) -> dict[str, AnyFolder]:
    """Place of each cell -> the folder that it is taken from: the one in which it is finished.

    Raises:
        ConfigError: that is so in two.
    """
    owners: dict[str, AnyFolder] = {}
    for cell in study.cells:
        done = [folder for folder in folders if _finished(study, folder, cell)]
        if len(done) > 1:
            raise ConfigError(
                f"{done[1].path}: {cell.label} is finished here and in {done[0].path}; merge "
                "folders of different seeds (or different rows, only=[...])"
            )
        there = [folder for folder in folders if folder.file(cell).is_file()]
        for folder in (*done, *there):
            owners.setdefault(cell.path, folder)
    return owners


def _finished(study: Study[Any, Any], folder: AnyFolder, cell: Cell[Any]) -> bool:
    record = folder.result(cell, study.records)
    return record is not None and "error" not in record


def _images(folders: Sequence[AnyFolder]) -> dict[str, Any]:
    """Fingerprints of the images, by split. Raises `ConfigError` where two folders differ."""
    found: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for folder in folders:
        for key, prints in (read_json(folder.path / IMAGES) or {}).items():
            if _without_sizes(found.setdefault(key, prints)) != _without_sizes(prints):
                raise ConfigError(
                    f"{folder.path}: its images ({key}) are not those of {origin[key]}; results "
                    "on different images cannot be put side by side"
                )
            origin.setdefault(key, folder.path)
    return found


def _without_sizes(prints: Any) -> Any:
    """An older folder has none."""
    return {k: v for k, v in prints.items() if k != "sizes"} if isinstance(prints, dict) else prints


def _notes(folders: Sequence[AnyFolder]) -> tuple[str, ...]:
    first, *others = folders
    ours = read_json(first.path / "versions.json") or {}
    notes = []
    for other in others:
        theirs = read_json(other.path / "versions.json") or {}
        names = [name for name in ("fedkd", "torch") if ours.get(name) != theirs.get(name)]
        notes += [
            f"{other.path} was run by {name} {theirs.get(name)}, {first.path} by {ours.get(name)}"
            for name in names
        ]
        notes += [
            f"{other.path}: {place.relative_to(other.path).as_posix()} is not that of {first.path};"
            " that one is kept, and students learnt each from the one beside them"
            for place in sorted((other.path / "teachers").glob("*/results.json"))
            if _hash(place) != _hash(first.path / place.relative_to(other.path))
            and (first.path / place.relative_to(other.path)).is_file()
        ]
    return tuple(notes)


def _hash(results: Path) -> Any:
    return (read_json(results) or {}).get("hash")


def _copy(source: AnyFolder, whole: AnyFolder, owners: Mapping[str, AnyFolder]) -> None:
    """Copy a folder's own cells, and what cells share if it is not there yet."""
    foreign = {path for path, owner in owners.items() if owner is not source}
    for file in sorted(source.path.rglob("*")):
        name = file.relative_to(source.path)
        if not file.is_file() or name.as_posix() in _OWN:
            continue
        places = {name.with_suffix("").as_posix(), *(p.as_posix() for p in name.parents)}
        target = whole.path / name
        if places & foreign or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
