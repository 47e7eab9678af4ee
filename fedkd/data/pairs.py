"""Transfer sets of pairs: each sample as several modalities show it.

A sound and a picture of the same digit are one sample with two sides. Every client sees one side,
the student one or all. Each side is a `FederatedData` of its own, and transfer, test and validation
images of all sides are about the same samples, so that answers can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.data.arrays import image_set, names_in, read_npz
from fedkd.data.images import ImageSet
from fedkd.data.label_noise import LabelNoise
from fedkd.data.labels import label_numbers, listed
from fedkd.data.pictures import shown
from fedkd.data.splits import FederatedData, federate
from fedkd.data.transfer import TransferSet, conform
from fedkd.randomness import stream

Pairing = Literal["class", "index"]


@dataclass(frozen=True)
class Side:
    """One modality's images, and who sees them.

    Attributes:
        train: Labelled images to draw from.
        test: Labelled test images.
        clients: Those that see this side.
        partition: Deals its private images to them.
        partition_options: Its options.
    """

    train: ImageSet
    test: ImageSet
    clients: tuple[int, ...]
    partition: str
    partition_options: Mapping[str, Any] = field(default_factory=dict)


def federate_pairs(
    sides: Mapping[str, Side],
    *,
    student: Sequence[str],
    by: Pairing,
    clients: int,
    transfer_size: int,
    transfer_labelled: bool = False,
    transfer_images: Mapping[str, ImageSet] | None = None,
    private_size: int | None = None,
    validation_size: int = 0,
    holdout: float = 0.0,
    test_size: int | None = None,
    label_noise: LabelNoise | None = None,
    seed: int,
) -> FederatedData:
    """The split of several data sets whose transfer images are pairs.

    Each side is dealt as `federate` deals a data set, to the clients that see it. Transfer images
    are paired `by` class (at random among those of a class, from the seed; labels are needed for
    that alone) or by index (the same places of all training sets). Test and validation images of
    the other sides are those of the same classes as the student's, in turn.

    Args:
        sides: Modality -> images and clients.
        student: The modalities that the student sees; several are put on top of each other as
            channels.
        by: How transfer images are paired.
        clients: Number of clients, over all sides.
        transfer_size: Pairs.
        transfer_labelled: Whether the student may use their labels.
        transfer_images: Modality -> images that are pairs by their places; they are drawn from
            these instead.
        private_size: Private images of each side over its clients; None: all that are left.
        validation_size: Labelled pairs the server holds.
        holdout: As in `federate`.
        test_size: Test images of the student used; None: all.
        label_noise: As in `federate`.
        seed: The run's seed.

    Raises:
        ValueError: sides do not fit together, or as `federate`.
    """
    first = student[0]
    check_classes({name: side.train for name, side in sides.items()})
    rows: Mapping[str, Tensor | None] = dict.fromkeys(sides)
    if transfer_images is None:
        trains = {name: side.train for name, side in sides.items()}
        rows = pair_rows(trains, first, by, transfer_size, seed)
    found: dict[str, FederatedData] = {}
    for name in (first, *(name for name in sides if name != first)):
        side = sides[name]
        try:
            data = federate(
                side.train,
                side.test,
                clients=clients,
                partition=side.partition,
                partition_options=side.partition_options,
                transfer_size=transfer_size,
                transfer_labelled=transfer_labelled,
                transfer_images=None if transfer_images is None else transfer_images[name],
                private_size=private_size,
                validation_size=validation_size,
                holdout=holdout,
                test_size=test_size if name == first else None,
                label_noise=label_noise,
                seed=seed,
                holders=side.clients,
                transfer_rows=rows[name],
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if name != first:
            data = replace(
                data,
                test=alike(found[first].test, data.test, f"{name}: test"),
                validation=alike(found[first].validation, data.validation, f"{name}: validation"),
            )
        found[name] = replace(data, modality=name)
    seen_by = [""] * clients
    for name, side in sides.items():
        for client in side.clients:
            seen_by[client] = name
    return whole(found, student, tuple(seen_by))


def whole(
    sides: Mapping[str, FederatedData], student: Sequence[str], seen_by: tuple[str, ...]
) -> FederatedData:
    """The data as the student sees them, with all sides; as a client's side, where that is all."""
    present = [name for name in student if name in sides]
    if len(present) < len(student):
        (name, only), *_ = sides.items()
        return replace(only, modality=name, sides=sides, seen_by=seen_by)
    main = sides[student[0]] if len(student) == 1 else _both([sides[name] for name in student])
    return replace(main, modality="+".join(student), sides=sides, seen_by=seen_by)


def check_classes(sides: Mapping[str, ImageSet]) -> None:
    """Refuse sides that name other things. Raises `ValueError`."""
    (first, images), *others = sides.items()
    for name, other in others:
        if other.classes != images.classes:
            odd = sorted(set(other.classes) ^ set(images.classes))
            how = f"{listed(odd)} are in one of them only" if odd else "their order differs"
            raise ValueError(f"{first} and {name} have different classes: {how}")


def pair_rows(
    sides: Mapping[str, ImageSet], first: str, by: Pairing, count: int, seed: int
) -> dict[str, Tensor]:
    """Rows of each side that make `count` pairs.

    Raises:
        ValueError: a side has too few images, or too few of a class.
    """
    total = len(sides[first]) if by == "class" else min(map(len, sides.values()))
    if count > total:
        raise ValueError(f"{count} pairs are asked for, but there are {total}")
    order = torch.randperm(total, generator=stream(seed, "split", "transfer"))[:count]
    if by == "index":
        return dict.fromkeys(sides, order)
    labels = sides[first].labels
    assert labels is not None
    rows = {first: order}
    for name, images in sides.items():
        if name == first:
            continue
        assert images.labels is not None
        rows[name] = torch.empty_like(order)
        for label in range(len(images.classes)):
            places = (labels[order] == label).nonzero().flatten()
            known = (images.labels == label).nonzero().flatten()
            if len(known) < len(places):
                raise ValueError(
                    f"{name}: {len(places)} images of class {images.classes[label]} are asked for "
                    f"to be paired with those of {first}, but there are {len(known)}; take fewer "
                    "pairs"
                )
            drawn = torch.randperm(len(known), generator=stream(seed, "pairs", name, label))
            rows[name][places] = known[drawn[: len(places)]]
    return rows


def alike(like: ImageSet, images: ImageSet, what: str) -> ImageSet:
    """An image of the same class for each of `like`, those of a class in turn.

    Raises:
        ValueError: there is none of some class.
    """
    assert like.labels is not None
    assert images.labels is not None
    rows = torch.empty(len(like), dtype=torch.int64)
    for label in like.labels.unique().tolist():
        places = (like.labels == label).nonzero().flatten()
        known = (images.labels == label).nonzero().flatten()
        if not len(known):
            raise ValueError(f"{what}: there is no image of class {like.classes[label]}")
        rows[places] = known[torch.arange(len(places)) % len(known)]
    return images.subset(rows)


def stacked(sets: Sequence[ImageSet]) -> ImageSet:
    """Images of the same samples as channels of one, in the largest size among them."""
    height = max(images.shape[1] for images in sets)
    width = max(images.shape[2] for images in sets)
    sized = [conform(images, (images.shape[0], height, width)) for images in sets]
    return replace(sized[0], images=torch.cat([images.images for images in sized], dim=1))


def read_pairs(path: Path, sides: Mapping[str, tuple[str, ...]]) -> dict[str, ImageSet]:
    """Pairs of a file: arrays `x_MODALITY` of one length, and `y` if their classes are known.

    Args:
        path: An .npz file.
        sides: Modality -> class names.

    Raises:
        ValueError: the file is none, or misses a side.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"the pairs are missing: {shown(path)}; write them with numpy.savez(path, "
            f"{', '.join(f'x_{name}=...' for name in sides)}, y=...)"
        )
    arrays = read_npz(path)
    absent = [f"x_{name}" for name in sides if f"x_{name}" not in arrays]
    if absent:
        raise ValueError(
            f"{shown(path)}: misses {', '.join(absent)}; found {listed(sorted(arrays)) or 'none'}"
        )
    lengths = {len(arrays[f"x_{name}"]) for name in sides}
    if len(lengths) > 1:
        raise ValueError(
            f"{shown(path)}: pairs need as many images on each side, found "
            + ", ".join(f"{len(arrays[f'x_{name}'])} of {name}" for name in sides)
        )
    labels = None
    if "y" in arrays:
        labels = label_numbers(arrays["y"], f"{shown(path)}: y")
    found = {}
    for name, classes in sides.items():
        known = names_in(path, arrays) if "classes" in arrays else classes
        found[name] = image_set(f"{shown(path)}: x_{name}", arrays[f"x_{name}"], labels, known)
    return found


def _both(sides: Sequence[FederatedData]) -> FederatedData:
    """What a student of several modalities sees: nobody has such private images."""
    first, nobody = sides[0], np.empty(0, np.int64)
    transfer = stacked([side.transfer.images for side in sides])
    mean, std = transfer.statistics()
    test = stacked([side.test for side in sides])
    empty = replace(test.subset(nobody), groups=None)
    return FederatedData(
        source=empty,
        shard_rows=(nobody,) * first.num_clients,
        holdout_rows=(nobody,) * first.num_clients,
        transfer=TransferSet(transfer, first.transfer.true_labels, transfer.fingerprint()),
        validation=stacked([side.validation for side in sides]),
        test=test,
        mean=mean,
        std=std,
    )
