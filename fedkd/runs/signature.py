"""What a run's networks need to be used where its data set is not.

The server writes it into the run when it starts: class names in label order, the shape of the
images, their normalisation, how picture files are read, and the models with their options. With
the checkpoints that is all there is to a student, so a run can be copied, its data deleted, and
its student still be asked. It is also what today's images are compared with before a finished run
is measured or gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedkd.config import Component, ConfigError, Experiment, Positive, Section, import_trusted
from fedkd.config import validate as validated
from fedkd.data.images import ImageSet
from fedkd.data.splits import FederatedData
from fedkd.io.records import read_json
from fedkd.models.build import build_model, is_known
from fedkd.models.entries import frozen_of
from fedkd.models.network import Network
from fedkd.runs.directory import RunDirectory, write_json

SIGNATURE, IMAGES = "signature.json", "images.json"
FORMAT = 1


class Pictures(Section):
    """How a picture file becomes an image of the data set; see `fedkd.data.pictures`.

    The last three are what `read_picture` does; they are kept so that a later version that reads
    otherwise does not do so in silence.
    """

    channels: Positive
    height: Positive
    width: Positive
    upright: bool = True
    filter: str = "bilinear"
    background: str = "white"

    @classmethod
    def of(cls, shape: tuple[int, int, int]) -> Pictures:
        """Those of a shape (channels, height, width)."""
        channels, height, width = shape
        return cls(channels=channels, height=height, width=width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width


class Signature(Section):
    """Inputs, outputs and networks of a run.

    Attributes:
        format: Version of this file.
        student: The student's model and its options.
        assistants: Those of the networks in between.
        classes: Names in label order.
        pictures: Shape of the images, and how picture files are read.
        mean: Per-channel mean of the pixels in [0, 1].
        std: Per-channel standard deviation of the pixels in [0, 1].
        transfer: Fingerprint of the transfer set, from which mean and std come.
        test: Fingerprint of the test images.
        modality: What the student sees, where clients see different things.
        together: Of a student that sees several, the pictures of each, which are channels on top of
            each other in this order.
        heads: Of a student with several, how many of the classes each has, in their order.
        root: Folder that relative data paths started from, on the machine of the run.
        plugins: The config's plugins, and the file that each came from.
    """

    format: int = FORMAT
    student: Component
    assistants: tuple[Component, ...] = ()
    classes: tuple[str, ...]
    pictures: Pictures
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transfer: str
    test: str
    modality: tuple[str, ...] = ()
    together: dict[str, Pictures] | None = None
    heads: dict[str, int] | None = None
    root: str
    plugins: dict[str, str]

    @classmethod
    def of(cls, experiment: Experiment, data: FederatedData, root: Path) -> Signature:
        """That of an experiment on this machine."""
        pictures, names = Pictures.of(data.test.shape), experiment.student.modality
        several = names if len(names) > 1 else ()
        modules = {name: sys.modules.get(name) for name in experiment.plugins}
        return cls(
            student=experiment.student.model,
            assistants=experiment.distillation.assistants,
            classes=data.classes,
            pictures=pictures,
            mean=data.mean,
            std=data.std,
            transfer=data.fingerprint,
            test=data.test_fingerprint,
            modality=names,
            together={n: Pictures.of(data.sides[n].test.shape) for n in several} or None,
            heads=None if data.heads is None else data.heads.sizes,
            root=str(root),
            plugins={n: str(getattr(m, "__file__", None) or "") for n, m in modules.items()},
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return self.pictures.shape

    def network(self, model: Component, run: RunDirectory) -> Network:
        """An untrained network for these images and classes.

        Args:
            model: One of those of the run.
            run: Whose signature this is; its plugins are imported only if it is trusted.

        Raises:
            ConfigError: there is no such model here, or it cannot take the images.
        """
        if not is_known(model.name):
            self._import_plugins(run)
        try:
            return build_model(
                model.name,
                num_classes=len(self.classes),
                in_channels=self.pictures.channels,
                image_size=self.pictures.height,
                mean=self.mean,
                std=self.std,
                options=model.options,
                file=frozen_of(model.name, model.options, Path(self.root)),
                root=Path(self.root),
                public=torch.empty(0, *self.shape, dtype=torch.uint8),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _import_plugins(self, run: RunDirectory) -> None:
        """Import the run's plugins. Raises `ConfigError` that says where each one was."""
        for name, file in self.plugins.items():
            try:
                import_trusted([name], run.path, trust=run.trusted)
            except ConfigError as error:
                where = f"; it was {file} when the run began" if file else ""
                raise ConfigError(f"{error}{where}") from None


def read_signature(run: RunDirectory) -> Signature | None:
    """The run's signature; None if there is none.

    Raises:
        ConfigError: the file is damaged, was changed, or is of a newer version.
    """
    file = run.path / SIGNATURE
    values = run.read_json(SIGNATURE)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping, got {type(values).__name__}")
    if isinstance(number := values.get("format"), int) and number > FORMAT:
        raise ConfigError(
            f"{file} has format {number}, this version of fedkd reads up to {FORMAT}: install the "
            "version that made the run (versions.json)"
        )
    checksum = values.pop("checksum", None)
    try:
        signature = validated(Signature, values, str(file))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if checksum is not None and checksum != _checksum(values):
        raise ConfigError(
            f"{file} was changed since the run wrote it (its checksum does not fit); if you did "
            'that on purpose, remove its line "checksum"'
        )
    _check(signature, file)
    return signature


def keep_signature(run: RunDirectory, signature: Signature) -> None:
    """Write the signature into its run, or see that the one there is the same.

    Raises:
        ConfigError: the run began with other images, classes or networks.
    """
    kept = read_signature(run)
    if kept is not None:
        for key in ("student", "assistants", "pictures", "classes", "transfer", "test"):
            _same(run.path, key, getattr(kept, key), getattr(signature, key))
        # The last bits of mean and std may differ between processors: the first ones stay.
        found = {"root": signature.root, "plugins": signature.plugins}
        if found == {"root": kept.root, "plugins": kept.plugins}:
            return
        signature = kept.model_copy(update=found)
    values = signature.model_dump(mode="json")
    run.write_json(SIGNATURE, {**values, "checksum": _checksum(values)})


def check_images(run: RunDirectory, data: FederatedData) -> None:
    """Raise `ConfigError` if these are not the images that the run was made with."""
    if (kept := read_signature(run)) is not None:
        _same(run.path, "classes", kept.classes, data.classes)
        _same(run.path, "transfer", kept.transfer, data.fingerprint)
        _same(run.path, "test", kept.test, data.test_fingerprint)
    elif (summary := run.read_json("summary.json")) is not None:  # knows less
        _same(run.path, "classes", tuple(summary["classes"]), data.classes)
        if "fingerprint" in summary["transfer"]:
            found = data.fingerprint
            _same(run.path, "transfer", summary["transfer"]["fingerprint"], found)


def keep_images(folder: Path, key: str, **sets: ImageSet) -> None:
    """Write down the images that a study begins with, or see that they are the same.

    What is finished in a study's folder is not done again, so one that went on with other images
    would compare what was measured on different ones.

    Args:
        folder: Of the study.
        key: Whose images these are, in a study of several splits.
        **sets: The images, by what they are for.

    Raises:
        ConfigError: the study began with others, or the file is damaged.
    """
    file = folder / IMAGES
    known = read_json(file)
    if known is None:
        known = {}
    if not isinstance(known, dict) or not isinstance(known.get(key, {}), dict):
        raise ConfigError(f"{file} is damaged (expected mappings); remove it")
    now = {name: images.fingerprint() for name, images in sets.items()}
    classes = list(next(iter(sets.values())).classes)
    if key not in known:
        sizes = {name: len(images) for name, images in sets.items()}
        write_json(file, {**known, key: {"classes": classes, "sizes": sizes, **now}})
        return
    began = known[key]
    names = began.get("classes")
    _same(folder, "classes", tuple(names) if isinstance(names, list) else (), tuple(classes))
    for name, fingerprint in now.items():
        if began.get(name) != fingerprint:
            raise ConfigError(
                f"{folder}: the {name} images are not those that the study began with "
                f"(fingerprint {began.get(name)} then, {fingerprint} now): put them back, or begin "
                "a new study"
            )


_WORDS = {
    "student": "student.model",
    "assistants": "distillation.assistants",
    "transfer": "the fingerprint of the transfer set",
    "test": "the fingerprint of the test images",
    "pictures": "the shape of the images",
}


def _same(folder: Path, key: str, began: Any, now: Any) -> None:
    if began == now:
        return
    if key == "classes":
        changes = f"new: {_few(now, began)}; gone: {_few(began, now)}"
        if sorted(map(str, now)) == sorted(map(str, began)):
            changes = "in another order"
        raise ConfigError(
            f"{folder}: the data set's classes are not those that it began with ({len(began)} "
            f"then, {len(now)} now; {changes}): put those images back"
        )
    mend = "config.yaml back" if key in ("student", "assistants") else "the run's images back"
    raise ConfigError(
        f"{folder}: {_WORDS[key]} was {_plain(began)} when the run began and is {_plain(now)} "
        f"now: put {mend}"
    )


def _few(names: Sequence[Any], others: Sequence[Any]) -> str:
    """Names that are not among the others; of many, the first ones."""
    found = [str(name) for name in names if name not in others]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(found[:5]) + more or "none"


def _plain(value: Any) -> str:
    if isinstance(value, Pictures):
        return f"{value.channels}x{value.height}x{value.width}"
    if isinstance(value, Component):
        return " ".join([value.name, *(f"{k}={v}" for k, v in value.options.items())])
    return ", ".join(map(_plain, value)) or "none" if isinstance(value, tuple) else str(value)


def _checksum(values: object) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(signature: Signature, file: Path) -> None:
    pictures = signature.pictures
    read = Pictures(channels=pictures.channels, height=pictures.height, width=pictures.width)
    for key, value in pictures.model_dump().items():
        if value != getattr(read, key):
            raise ConfigError(
                f"{file}: pictures.{key}: this version of fedkd reads pictures with "
                f"{getattr(read, key)!r} only, got {value!r}"
            )
    if pictures.height != pictures.width:
        raise ConfigError(
            f"{file}: pictures: networks take square images, got {pictures.height} x "
            f"{pictures.width}"
        )
    if not signature.classes:
        raise ConfigError(f"{file}: classes: expected at least one name, got none")
    for key in ("mean", "std"):
        numbers = getattr(signature, key)
        if len(numbers) != pictures.channels or not all(map(math.isfinite, numbers)):
            raise ConfigError(
                f"{file}: {key}: expected {pictures.channels} finite numbers, got {list(numbers)}"
            )
