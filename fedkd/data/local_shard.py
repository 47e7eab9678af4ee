"""A machine that holds one client's images and no others.

The split of a data set comes apart into two files: the public part (transfer and test images),
which every machine has, and the private part, which its owner alone has. A machine with both
derives what one with the whole data set derives, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkd.data.arrays import image_set, labelled_sets, names_in, read_npz
from fedkd.data.folders import read_folder
from fedkd.data.images import ImageSet
from fedkd.data.labels import label_numbers, listed
from fedkd.data.pairs import whole
from fedkd.data.pictures import shown
from fedkd.data.splits import FederatedData, hold_out
from fedkd.data.transfer import TransferSet


@dataclass(frozen=True)
class LocalShard:
    """Where this machine's images are.

    Attributes:
        client: Whose images they are.
        private: An .npz file with `x` and `y`, or a folder of pictures with a subfolder per class.
        public: File of the public part; None: the one that the config names.
    """

    client: int
    private: Path
    public: Path | None = None


def write_public(
    data: FederatedData, path: Path, *, answers: bool, client: int | None = None
) -> None:
    """Write transfer, test and validation images to one .npz file.

    Args:
        data: The split.
        path: The file.
        answers: Also all labels that are known, for the server. Nodes need none but those of a
            labelled transfer set.
        client: Whose node it is: of pairs it gets its own side. None: all sides.
    """
    sides: Mapping[str, FederatedData] = {"": data}
    if data.sides:
        own = None if client is None else data.seen_by[client]
        sides = {f"_{name}": s for name, s in data.sides.items() if own in (None, name)}
    arrays: dict[str, np.ndarray] = {}
    for suffix, side in sides.items():
        transfer = side.transfer.images
        labels = {
            "y_transfer": side.transfer.true_labels if answers else transfer.labels,
            "y_test": side.test.labels if answers else None,
            "y_validation": side.validation.labels if answers else None,
        }
        arrays |= {
            f"x_transfer{suffix}": _channels_last(transfer),
            f"x_test{suffix}": _channels_last(side.test),
            f"x_validation{suffix}": _channels_last(side.validation),
            **{f"{name}{suffix}": y.numpy() for name, y in labels.items() if y is not None},
        }
    _write(path, **arrays, classes=np.array(data.classes))


def write_private(data: FederatedData, client: int, path: Path) -> None:
    """Write what `client` holds, its held-out images too, to one .npz file."""
    images = data.held_by(client)
    assert images.labels is not None
    _write(
        path, x=_channels_last(images), y=images.labels.numpy(), classes=np.array(images.classes)
    )


def read_local_shard(
    public: Path,
    own: LocalShard | None,
    *,
    clients: int,
    transfer_labelled: bool,
    holdout: float,
    seed: int,
    student: Sequence[str] = (),
    seen_by: tuple[str, ...] = (),
) -> FederatedData:
    """The split as seen from a machine with the public images and those of one client, or none.

    Args:
        public: What `write_public` wrote.
        own: The client that lives here; None on the server.
        clients: Number of clients; those that live elsewhere have empty shards.
        transfer_labelled: Whether the student may use the labels of the transfer set.
        holdout: Share that the client keeps for validation.
        seed: The run's seed.
        student: Of pairs, the modalities that the student sees.
        seen_by: Of pairs, each client's modality. A client needs its own side alone.

    Raises:
        ValueError: files that are not what they should be, or do not fit together.
        FileNotFoundError: there is no such file.
    """
    if not public.is_file():
        raise FileNotFoundError(
            f"the public images are missing: {public}; copy the public.npz that "
            "`fedkd deploy init --own-data` wrote"
        )
    arrays = read_npz(public)
    read = partial(
        _read_side,
        public,
        arrays,
        clients=clients,
        transfer_labelled=transfer_labelled,
        holdout=holdout,
        seed=seed,
    )
    if not seen_by:
        return read("", own)
    names = dict.fromkeys((*student, *seen_by))
    if own is not None:
        if not 0 <= own.client < clients:
            raise ValueError(f"there is no client {own.client}: clients are 0 to {clients - 1}")
        names = dict.fromkeys([seen_by[own.client]])
    sides = {name: replace(read(f"_{name}", own), modality=name) for name in names}
    return whole(sides, student, seen_by)


def _read_side(
    public: Path,
    arrays: Mapping[str, np.ndarray],
    suffix: str,
    own: LocalShard | None,
    *,
    clients: int,
    transfer_labelled: bool,
    holdout: float,
    seed: int,
) -> FederatedData:
    """One side of what `write_public` wrote, or all there is."""
    absent = {f"x_{name}{suffix}" for name in ("transfer", "test", "validation")} | {"classes"}
    absent -= set(arrays)
    if absent:
        raise ValueError(f"{shown(public)}: misses {', '.join(sorted(absent))}")
    classes = names_in(public, arrays)

    def images(name: str, *, may_be_empty: bool = False) -> ImageSet:
        name += suffix
        labels = arrays.get(f"y_{name}")
        known = None if labels is None else label_numbers(labels, f"{shown(public)}: y_{name}")
        what = f"{shown(public)}: x_{name}"
        return image_set(what, arrays[f"x_{name}"], known, classes, may_be_empty=may_be_empty)

    test, common = images("test"), images("transfer")
    if test.shape != common.shape:
        raise ValueError(
            f"{shown(public)}: transfer images are {common.shape}, test images {test.shape}"
        )
    if common.labels is None and transfer_labelled:
        raise ValueError(
            f"{shown(public)}: the transfer images have no labels (y_transfer{suffix})"
        )
    chosen = common if transfer_labelled else common.unlabelled()
    mean, std = chosen.statistics()
    nothing = np.empty(0, np.int64)
    shards, holdouts = [nothing] * clients, [nothing] * clients
    source = replace(test.subset(nothing), labels=torch.empty(0, dtype=torch.int64))
    if own is not None:
        source = _read_private(own.private, test)
        if 0 <= own.client < clients:
            kept = hold_out(len(source), holdout, seed, own.client)
            shards[own.client], holdouts[own.client] = kept
    return FederatedData(
        source=source,
        shard_rows=tuple(shards),
        holdout_rows=tuple(holdouts),
        transfer=TransferSet(chosen, common.labels, chosen.fingerprint()),
        validation=images("validation", may_be_empty=True),
        test=test,
        mean=mean,
        std=std,
    )


def _read_private(path: Path, like: ImageSet) -> ImageSet:
    """A client's images, with the classes of `like` and in its shape; classes go by name."""
    if path.is_dir():
        found = read_folder(path, like.side, like.shape[0] == 1)
    elif path.is_file():
        found = _from_arrays(path, read_npz(path), like.classes)
    else:
        raise FileNotFoundError(
            f"this node's private images are missing: {shown(path)}; expected an .npz file "
            "with x and y, or a folder with a subfolder of pictures per class"
        )
    strange = sorted(set(found.classes) - set(like.classes))
    if strange:
        raise ValueError(
            f"{shown(path)}: unknown classes {listed(strange)}; the experiment has "
            f"{listed(like.classes)}"
        )
    if found.shape != like.shape:
        raise ValueError(f"{shown(path)}: images are {found.shape}, the public ones {like.shape}")
    assert found.labels is not None
    number = torch.tensor([like.classes.index(name) for name in found.classes])
    return replace(found, labels=number[found.labels], classes=like.classes)


def _from_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], classes: tuple[str, ...]
) -> ImageSet:
    if not {"x", "y"} <= set(arrays):
        raise ValueError(
            f"{shown(path)}: expected arrays x and y, with all images of this node, found "
            f"{listed(sorted(arrays)) or 'none'}"
        )
    (images,) = labelled_sets(path, arrays, [("x", "y")], classes)
    return images


def _channels_last(images: ImageSet) -> np.ndarray:
    return images.images.permute(0, 2, 3, 1).contiguous().numpy()


def _write(path: Path, **arrays: Any) -> None:
    """Write arrays so that a crash leaves no half file."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
