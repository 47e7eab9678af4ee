"""The one door to Hugging Face's `datasets`: files of theirs, and partitioners of Flower Datasets.

Nothing is downloaded: files and folders of this machine are read, as they are.
"""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.data import DATASETS
from fedkd.data.convert import declared_names
from fedkd.data.datasets import Sets, below, fifth_apart
from fedkd.data.images import Classes, ImageSet
from fedkd.data.labels import listed
from fedkd.data.pictures import shown
from fedkd.io.extras import extra

_PARTS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
_ROW = "fedkd_row"


@DATASETS.register("hf")
def hf(
    root: Path | None,
    *,
    path: str,
    image: str | None = None,
    label: str | None = None,
    classes: dict[str | int, str] | tuple[str | int, ...] | None = None,
    size: int | None = None,
    grey: bool | None = None,
    skip_unreadable: bool = False,
) -> Sets:
    """A Hugging Face Dataset on this machine: parquet, arrow, or a folder of either.

    A folder that `save_to_disk` wrote, one of files named by their split
    (`train-00000-of-00002.parquet`), a folder of pictures with a `metadata` file, or one file. Of
    a data set without a test split, `validation` is one; without either a fixed fifth per class
    becomes it.

    Args:
        root: Folder that a relative `path` starts from; default: the working directory.
        path: The file or folder.
        image: Column of the pictures; None: found by its type or name.
        label: Column of the classes; None: likewise.
        classes: Which are kept, or a mapping from them to new names; None: all.
        size: Height and width in pixels; None: all pictures are square and of one size.
        grey: One channel instead of three; None: as the pictures have.
        skip_unreadable: Leave pictures out that cannot be read, and warn with their number.
    """
    place = below(root, path)
    with tempfile.TemporaryDirectory() as scratch:
        found = _splits(place, Path(scratch))
        options: dict[str, Any] = {
            "image": image, "label": label, "size": size, "grey": grey,
            "skip_unreadable": skip_unreadable,
        }  # fmt: skip
        try:
            names = next((n for s in found.values() if (n := declared_names(s, label))), None)
        except ValueError as error:
            raise ValueError(f"{shown(place)}: {error}") from None
        sets = {}
        for part, dataset in found.items():
            try:
                # The labels of a part that names no classes are those of the part before it.
                sets[part] = ImageSet.from_dataset(dataset, names=names, **options)
            except ValueError as error:
                raise ValueError(f"{shown(place)}: {part}: {error}") from None
            names = names or sets[part].classes
        chosen = {part: images.only(classes) for part, images in sets.items()}
    return _pair(chosen, place, classes)


def _pair(sets: dict[str, ImageSet], place: Path, classes: Classes) -> Sets:
    if "test" not in sets and "val" in sets:
        sets["test"] = sets.pop("val")
    if "test" not in sets:
        return fifth_apart(sets["train"], shown(place), "a test split")
    if "train" not in sets:
        raise ValueError(f"{shown(place)}: there is no training split, found {listed(list(sets))}")
    return tuple(sets[part] for part in ("train", "test", "val") if part in sets)


def _splits(place: Path, scratch: Path) -> dict[str, Any]:
    """The splits that are there, each as a `datasets.Dataset`, by `train`, `test`, `val`."""
    with extra("hf", "data set 'hf'"):
        import datasets

    if not place.exists():
        raise FileNotFoundError(
            f"data set 'hf' misses {shown(place)}; expected a .parquet or .arrow file, or a folder "
            "of them, as dataset.save_to_disk(...) or dataset.to_parquet(...) write it"
        )
    try:
        if place.is_file():
            return {"train": _read([place])}
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            found = datasets.load_from_disk(str(place))
            return _by_split({"train": found} if isinstance(found, datasets.Dataset) else found)
        files = sorted(p for p in place.rglob("*") if p.suffix in (".parquet", ".arrow"))
        files = [p for p in files if not p.stem.startswith("metadata")]
        if files:
            parts: dict[str, list[Path]] = {}
            for file in files:
                words = re.split(r"[^a-z]+", str(file.relative_to(place)).casefold())
                split = next((_PARTS[word] for word in words if word in _PARTS), "train")
                parts.setdefault(split, []).append(file)
            return {split: _read(own) for split, own in parts.items()}
        if not any(place.rglob("metadata.*")):
            raise ValueError(
                f"{shown(place)}: no .parquet or .arrow file; for folders of pictures take data "
                "set 'image_folder'"
            )
        datasets.disable_progress_bars()
        found = datasets.load_dataset("imagefolder", data_dir=str(place), cache_dir=str(scratch))
        return _by_split(found)
    except (OSError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{shown(place)}: cannot be read as a data set ({reason[:200]})") from None


def _by_split(found: Any) -> dict[str, Any]:
    known = {_PARTS[name.casefold()]: part for name, part in found.items() if name in _PARTS}
    if not known:
        raise ValueError(
            f"expected splits train and test, found {listed([str(name) for name in found])}"
        )
    return known


def _read(files: list[Path]) -> Any:
    """Parquet or arrow files as one data set, without a copy in a cache."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parts = [
            datasets.Dataset(datasets.table.InMemoryTable(pq.read_table(file)))
            if file.suffix == ".parquet"
            else datasets.Dataset.from_file(str(file), in_memory=True)
            for file in files
        ]
    except pa.ArrowInvalid as error:
        raise OSError(error) from None
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def dealt_by(
    partitioner: Any, given: Any, train: ImageSet, private: np.ndarray, clients: int
) -> list[np.ndarray]:
    """The private images as a partitioner of Flower Datasets deals them.

    It deals all training images, as it does in Flower; those that became transfer or validation
    images are then nobody's.

    Args:
        partitioner: Any; what it holds is left as it is.
        given: The training images as they were handed over: of a Hugging Face Dataset it sees all
            columns but the pictures.
        train: The same, read.
        private: Rows that are dealt.
        clients: How many there are.

    Returns:
        Per client the positions in `private` of its images.

    Raises:
        ValueError: it cannot deal them, or leaves a client with none.
    """
    with extra("hf", "a partitioner of Flower Datasets"):
        import datasets

    by = getattr(partitioner, "_partition_by", None)
    if hasattr(given, "features") and hasattr(given, "column_names"):
        heavy = [n for n, f in given.features.items() if type(f).__name__ in ("Image", "Array3D")]
        table = given.remove_columns([name for name in heavy if name != by])
        if _ROW in table.column_names:
            table = table.remove_columns([_ROW])
        table = table.add_column(_ROW, list(range(len(train))))
    else:
        columns = {_ROW: list(range(len(train)))}
        source = train.labels if train.groups is None or by in ("label", None) else train.groups
        assert source is not None
        columns[by if isinstance(by, str) else "label"] = source.tolist()
        table = datasets.Dataset.from_dict(columns)
    own = getattr(partitioner, "_dataset", None)
    fresh = copy.deepcopy(partitioner, {id(own): own})  # its random state is not to move
    fresh._dataset = None
    name = type(partitioner).__name__
    try:
        fresh.dataset = table
        if fresh.num_partitions != clients:
            raise ValueError(f"it makes {fresh.num_partitions} parts for {clients} clients")
        parts = [np.asarray(fresh.load_partition(n)[_ROW], np.int64) for n in range(clients)]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"partition: {name} cannot deal {len(train)} images: {reason}") from None
    place = np.full(len(train), -1)
    place[private] = np.arange(len(private))
    mine = [np.sort(found[found >= 0]) for found in (place[part] for part in parts)]
    for client, part in enumerate(mine):
        if not len(part):
            raise ValueError(
                f"partition: {name} leaves client {client} without private images; take a smaller "
                "transfer set, or fewer partitions"
            )
    return mine
