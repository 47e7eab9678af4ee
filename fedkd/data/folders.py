"""Folders of pictures: what is a class, what is a split, what is passed over."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np

from fedkd.data.arrays import as_tensor
from fedkd.data.images import ImageSet
from fedkd.data.labels import class_names, label_numbers, listed
from fedkd.data.pictures import SUFFIXES, read_pictures, shown

logger = logging.getLogger(__name__)

# Beside names that begin with a dot: what archives, file servers and notebooks leave behind.
_LITTER = {
    "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__",
}  # fmt: skip

# Pictures that are not read; whoever has them should know.
_OTHER_SUFFIXES = {
    ".avif", ".cr2", ".dcm", ".dng", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".nef",
    ".npy", ".svg", ".tga",
}  # fmt: skip

_PARTS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip


def read_folder(folder: Path, size: int, grey: bool, *, skip_unreadable: bool = False) -> ImageSet:
    """One class per visible subfolder, in the order of their names.

    Args:
        folder: The folder.
        size: Height and width in pixels.
        grey: One channel instead of three.
        skip_unreadable: Leave pictures out that cannot be read, and warn with their number.

    Raises:
        ValueError: no class folders, one without pictures, or a picture that cannot be read.
    """
    folders: dict[str, Path] = {}
    for path in _folders(folder):
        (name,) = class_names([path.name], shown(path))
        if name in folders:
            raise ValueError(f"{shown(folder)}: two folders are called {name}; merge them")
        folders[name] = path
    if not folders:
        raise ValueError(f"{shown(folder)}: no class folders")
    names = class_names(sorted(folders), shown(folder))
    _check_links(folder, folders)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = _pictures(folders[name])
        files += found
        labels += [label] * len(found)
    unreadable: list[int] | None = [] if skip_unreadable else None
    try:
        pixels = read_pictures(
            files, channels=1 if grey else 3, height=size, width=size, unreadable=unreadable
        )
    except ValueError as error:
        hint = "" if skip_unreadable else "; leave such pictures out with skip_unreadable: true"
        raise ValueError(f"{error}{hint}") from None
    kept = np.delete(np.asarray(labels), unreadable or [])
    return ImageSet(as_tensor(pixels), label_numbers(kept), names)


def split_folders(folder: Path) -> tuple[Path, ...] | None:
    """The folders of training, test and perhaps validation images; None if they are classes.

    `train`, `test` and `val` (and their longer forms) are splits where they hold folders, and
    classes where they hold pictures. Without `test`, `val` is the test set.

    Raises:
        ValueError: a split without its counterpart, or a mixture of both readings.
    """
    splits: dict[str, Path] = {}
    flat: list[Path] = []
    rest: list[Path] = []
    for path in _folders(folder):
        part = _PARTS.get(path.name.casefold())
        if part is None:
            rest.append(path)
        elif any(_is_picture(child) for child in _visible(path)):
            flat.append(path)
        elif part in splits:
            raise ValueError(
                f"{shown(folder)} has {splits[part].name}/ and {path.name}/; keep one of them"
            )
        else:
            splits[part] = path
    if not splits:
        return None
    counterpart = "test" if "test" in splits else "val"
    if "train" in splits and counterpart in splits:
        left = [path.name for path in (*flat, *rest)]
        if counterpart == "val":
            logger.warning(
                "%s has no test/: %s/ is the test set", shown(folder), splits["val"].name
            )
        if left:
            logger.warning("%s: %s beside the splits are not read", shown(folder), listed(left))
        wanted = dict.fromkeys(("train", counterpart, "val"))
        return tuple(splits[name] for name in wanted if name in splits)
    if flat:
        raise ValueError(
            f"{shown(folder)}: {next(iter(splits.values())).name}/ holds folders, but "
            f"{flat[0].name}/ holds pictures: sort them into class folders as well, or move "
            f"{flat[0].name}/ away"
        )
    there = next(iter(splits.values())).name
    absent = "train" if "train" not in splits else "test"
    raise ValueError(
        f"{shown(folder)} has {there}/ but no {absent}/; add it, or point path to {there}/ "
        f"to have a fifth of it split off; if {there} is a class, put its pictures directly into it"
    )


def check_several(images: ImageSet, folder: Path) -> None:
    """Raises `ValueError` if there is one class only: path often points one level too high."""
    if len(images.classes) > 1:
        return
    (only,) = _folders(folder)
    inside = [path.name for path in _folders(only)]
    mend = f"; if {listed(inside)} are the classes, point path to {only.name}/" if inside else ""
    raise ValueError(
        f"{shown(folder)}: only one class folder, {images.classes[0]}; expected one per class{mend}"
    )


def _visible(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
        return [p for p in found if not p.name.startswith(".") and p.name not in _LITTER]
    except OSError as error:
        _unreadable(error, folder)


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in _visible(folder) if path.is_dir()]
    except OSError as error:
        _unreadable(error, folder)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _pictures(folder: Path) -> list[Path]:
    """All pictures below a class folder."""
    inside = {_PARTS.get(path.name.casefold()) for path in _folders(folder)}
    if "train" in inside and inside & {"test", "val"}:
        raise ValueError(
            f"{shown(folder)}: a class folder with train/ and test/ in it would mix the two; turn "
            f"the order round: train/{folder.name}/ and test/{folder.name}/"
        )
    found: list[Path] = []
    others: Counter[str] = Counter()
    # Links to folders are not followed: they may lead round in a circle, or to another class.
    for place, folders, files in os.walk(folder, onerror=lambda e: _unreadable(e, folder)):
        folders[:] = [name for name in folders if name[0] != "." and name not in _LITTER]
        for name in folders:
            if (Path(place) / name).is_symlink():
                logger.warning("%s: a link to a folder is not followed", shown(Path(place) / name))
        for name in files:
            path = Path(place) / name
            if name.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            elif path.suffix.lower() in _OTHER_SUFFIXES:
                others[path.suffix.lower()] += 1
    passed = listed([f"{count} {suffix}" for suffix, count in sorted(others.items())])
    if not found:
        raise ValueError(
            f"{shown(folder)}: no pictures ({', '.join(SUFFIXES)})"
            f"{f'; there are {passed}: convert them' if others else ''}"
        )
    if others:
        logger.warning(
            "%s: pictures of other formats are not read (%s): convert them", shown(folder), passed
        )
    return sorted(found)


def _check_links(folder: Path, folders: dict[str, Path]) -> None:
    """Class folders that are links must not lead to each other or back up."""
    here = folder.resolve()
    seen: dict[Path, str] = {}
    for name, path in folders.items():
        target = path.resolve()
        if target == here or target in here.parents:
            raise ValueError(f"{shown(path)}: a link back to {shown(target)} is no class folder")
        if target in seen:
            raise ValueError(
                f"{shown(folder)}: {seen[target]} and {name} are the same folder; each class "
                "needs its own"
            )
        seen[target] = name


def _unreadable(error: OSError, folder: Path) -> NoReturn:
    reason = error.strerror or type(error).__name__
    raise ValueError(f"{shown(error.filename or folder)}: cannot be read ({reason})") from None
