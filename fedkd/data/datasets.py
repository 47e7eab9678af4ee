"""Data sets: functions from a local folder to (training images, test images).

A data set is registered under the name that configs use, takes the folder of local data (or
None) and keyword options, and reads only: nothing is downloaded and nothing is written.
Class names are real ones, in label order.
"""

from __future__ import annotations

import gzip
import importlib
import logging
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkd.data import DATASETS
from fedkd.data.arrays import as_tensor, check_room, image_set, labelled_sets, read_npz
from fedkd.data.folders import check_several, read_folder, split_folders
from fedkd.data.images import ImageSet
from fedkd.data.labels import label_numbers, listed
from fedkd.data.pictures import shown
from fedkd.randomness import stream

logger = logging.getLogger(__name__)

Pair = tuple[ImageSet, ImageSet]
Sets = tuple[ImageSet, ...]
"""Training and test images, and perhaps validation images."""

DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle",
    "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar",
    "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile",
    "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster",
    "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster",
    "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy",
    "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal",
    "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar",
    "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
    "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman",
    "worm",
)  # fmt: skip

# A mirrored digit or letter is another one, or none: data sets that are not to be mirrored. Of a
# user's own images nothing is known; they are mirrored only where the config says so.
ONE_WAY_ROUND = ("digits", "mnist", "kmnist", "svhn")


def load_dataset(name: str, root: str | Path | None = None, **options: Any) -> Pair:
    """The (train, test) images of the data set `name`; arguments and errors as in `load_splits`."""
    train, test = load_splits(name, root, **options)[:2]
    return train, test


def load_splits(name: str, root: str | Path | None = None, **options: Any) -> Sets:
    """The (train, test) or (train, test, validation) images of the data set `name`.

    Args:
        name: A registered data set.
        root: Folder of local data; default: the environment variable FEDKD_DATA.
        **options: Options of the data set.

    Raises:
        ValueError: unknown name or option, or files that are not what they should be.
        FileNotFoundError: files are missing; the message names them and says how to get them.
    """
    if not isinstance(name, str):
        raise ValueError(f"name: expected the name of a data set, got {name!r}")
    where = "root" if root else "FEDKD_DATA"
    place = root or os.environ.get("FEDKD_DATA")
    try:
        folder = Path(place).expanduser() if place else None
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"{where}: expected a folder of local data, {shown(folder)} is a file")
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{where}: expected a folder of local data, got {place!r} ({error})"
        ) from None
    paths = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in options.items()}
    sets = DATASETS.create(name, folder, **paths)
    known = isinstance(sets, tuple | list) and len(sets) in (2, 3)
    if not known or {type(part) for part in sets} != {ImageSet}:
        raise ValueError(
            f"data set {name!r}: expected two ImageSets, (train, test), got {type(sets).__name__}"
        )
    for images, what in zip(sets, ("training", "test", "validation")):
        if not len(images):
            raise ValueError(f"data set {name!r}: there are no {what} images")
    return tuple(sets)


@DATASETS.register("digits")
def digits(root: Path | None) -> Pair:
    """1797 grey 8x8 digits that come with scikit-learn (1438 to train, 359 to test)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return fifth_apart(ImageSet(as_tensor(pixels), label_numbers(bunch.target), DIGITS))


@DATASETS.register("mnist")
def mnist(root: Path | None) -> Pair:
    """MNIST: 60,000 + 10,000 grey 28x28 handwritten digits."""
    return _idx_pair(root, "mnist", "MNIST", DIGITS)


@DATASETS.register("fashion_mnist")
def fashion_mnist(root: Path | None, *, classes: tuple[int, ...] | None = None) -> Pair:
    """Fashion-MNIST: 60,000 + 10,000 grey 28x28 pictures of clothing.

    Args:
        root: Folder of local data.
        classes: Numbers of those that are kept, then counted from 0; None: all of them.
    """
    train, test = _idx_pair(root, "fashion_mnist", "FashionMNIST", FASHION)
    if classes is not None and len(classes) < 2:
        raise ValueError(
            f"data set 'fashion_mnist': classes: expected at least two, got {list(classes)}"
        )
    return train.only(classes), test.only(classes)


@DATASETS.register("kmnist")
def kmnist(root: Path | None) -> Pair:
    """Kuzushiji-MNIST: 60,000 + 10,000 grey 28x28 cursive Japanese characters."""
    return _idx_pair(root, "kmnist", "KMNIST", KUZUSHIJI)


@DATASETS.register("cifar10")
def cifar10(root: Path | None) -> Pair:
    """CIFAR-10: 50,000 + 10,000 colour 32x32 photographs of 10 classes."""
    return _cifar(root, "cifar10", "CIFAR10", "cifar-10-batches-py", CIFAR10)


@DATASETS.register("cifar100")
def cifar100(root: Path | None) -> Pair:
    """CIFAR-100: 50,000 + 10,000 colour 32x32 photographs of 100 fine classes."""
    return _cifar(root, "cifar100", "CIFAR100", "cifar-100-python", CIFAR100)


@DATASETS.register("svhn")
def svhn(root: Path | None) -> Pair:
    """SVHN: 73,257 + 26,032 colour 32x32 house-number digits (`train_32x32.mat`, `test_...`)."""
    names = ("train_32x32.mat", "test_32x32.mat")
    get = (
        "from fedkd.data.vision import datasets; "
        "[datasets.SVHN({root!r}, s, download=True) for s in ('train', 'test')]"
    )
    files = _files(root, "svhn", names, names, get)
    loadmat = importlib.import_module("scipy.io").loadmat

    sets = []
    for file in files:
        try:
            content = loadmat(file)
            pixels, labels = content["X"].transpose(3, 0, 1, 2), content["y"].astype(np.int64)
        except Exception as error:  # damaged files make the reader raise nearly anything
            raise _damaged(file, "a file of SVHN", error) from None
        digits = label_numbers(labels % 10, f"{shown(file)}: y")  # the file calls the digit 0 "10"
        sets.append(image_set(f"{shown(file)}: X", pixels, digits, DIGITS))
    return sets[0], sets[1]


@DATASETS.register("npz")
def npz(
    root: Path | None,
    *,
    path: str,
    side: str | None = None,
    groups: str | None = None,
    classes: dict[str | int, str] | tuple[str | int, ...] | None = None,
    columns: Sequence[str] = (),
) -> Sets:
    """Your own uint8 arrays in one .npz file.

    The file holds `x_train`, `y_train`, `x_test`, `y_test` (or `x` and `y` for those to train
    on), or `x` and `y` alone, of which a fixed fifth per class becomes the test set. MedMNIST's
    files are read as they are: `train_images`, `train_labels`, `test_images`, `test_labels`.
    `x_val` and `y_val`, or `val_images` and `val_labels`, are the validation images. Images are
    (N, height, width), (N, height, width, channels) or (N, channels, height, width) with 1 or 3
    channels (if both readings are possible, channels are last). Labels are (N,) or (N, 1) and
    count from 0; others, such as 1 to C or record numbers, are numbered anew. An array `classes`
    may name the classes.

    Args:
        root: Folder that a relative `path` starts from; default: the working directory.
        path: The file.
        side: Of a file that shows each sample in several ways, which: its arrays are called
            `x_SIDE`, `x_SIDE_train`, and so on; labels are those of all sides.
        groups: Array (N,) beside `y` that says where each image comes from, for partition `group`
            (of `y_train`: the array's name with `_train`).
        classes: Which are kept, by name or number, or a mapping from them to new names; None: all.
        columns: Of a file that labels each image in several ways, which: arrays `y_COLUMN`, or
            `y_COLUMN_train` and so on. Classes are the combinations that occur, `COLUMN=VALUE, …`.
    """
    file = below(root, path)
    if file.is_dir():
        raise ValueError(
            f"data set 'npz': {shown(file)} is a folder; for folders of pictures take data set "
            "'image_folder'"
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"data set 'npz' misses {shown(file)}; write it with numpy.savez("
            "path, x_train=..., y_train=..., x_test=..., y_test=...)"
        )
    arrays = read_npz(file)
    if side is not None:
        arrays = _of_side(file, arrays, side)
    if columns:
        arrays = _combined(file, arrays, columns)
    parts = _parts(file, set(arrays), groups)
    sets = labelled_sets(file, arrays, parts)
    if groups is not None:
        origin = _beside(groups, parts[0][1])
        if origin not in arrays:
            raise ValueError(
                f"{shown(file)}: groups: there is no array {origin!r}, found "
                f"{listed(sorted(arrays))}"
            )
        sets[0] = replace(sets[0], groups=_numbered(arrays[origin]))
    try:
        sets = [each.only(classes) for each in sets]
    except ValueError as error:
        raise ValueError(f"{shown(file)}: {error}") from None
    if len(sets[0].classes) < 2:
        raise ValueError(
            f"{shown(file)}: only one class, {sets[0].classes[0]}; expected two or more"
        )
    if len(sets) == 1:
        return fifth_apart(sets[0], shown(file), "x_test and y_test")
    for other, what in zip(sets[1:], ("test", "validation")):
        if sets[0].shape != other.shape:
            raise ValueError(
                f"{shown(file)}: training images are {sets[0].shape}, {what} images {other.shape}"
            )
    return tuple(sets)


_TRAIN_TEST = (("x_train", "y_train"), ("x_test", "y_test"))
# How images and labels may be called, the training images first: ours, and MedMNIST's.
_LAYOUTS = (
    _TRAIN_TEST,
    (("x", "y"), ("x_test", "y_test")),
    (("train_images", "train_labels"), ("test_images", "test_labels")),
    (("x", "y"),),
)
# Validation images beside a layout of training and test images, likewise.
_VALIDATION = (("x_val", "y_val"), ("val_images", "val_labels"))


def _of_side(file: Path, arrays: Mapping[str, np.ndarray], side: str) -> Mapping[str, np.ndarray]:
    """One side's pictures as `x`, and what belongs to all sides."""
    name = f"x_{side}"
    own = {
        f"x{key.removeprefix(name)}": array
        for key, array in arrays.items()
        if key == name or key.startswith(f"{name}_")
    }
    if not own:
        raise ValueError(
            f"{shown(file)}: there is no array x_{side}, found {listed(sorted(arrays)) or 'none'}"
        )
    return own | {key: array for key, array in arrays.items() if not key.startswith("x")}


def _combined(
    file: Path, arrays: Mapping[str, np.ndarray], columns: Sequence[str]
) -> Mapping[str, np.ndarray]:
    """Several columns of labels as one, `y`, of the combinations that occur."""
    ends = [end for end in ("", "_train", "_test", "_val") if f"y_{columns[0]}{end}" in arrays]
    codes, names = [], []
    for column in columns:
        keys = [f"y_{column}{end}" for end in ends]
        for key in keys or [f"y_{column}"]:
            if key not in arrays or arrays[key].reshape(-1).shape != arrays[key].shape[:1]:
                raise ValueError(
                    f"{shown(file)}: columns: expected an array {key} of one label for each image, "
                    f"found {listed(sorted(arrays)) or 'none'}"
                )
        values, code = np.unique(np.concatenate([arrays[k] for k in keys]), return_inverse=True)
        if values.dtype.kind not in "iuU" or any(", " in str(value) for value in values):
            raise ValueError(
                f"{shown(file)}: {keys[0]}: expected whole numbers, or words without ', ', got "
                f"{values.dtype} ({listed([str(value) for value in values])})"
            )
        codes.append(code.reshape(-1))
        names.append([f"{column}={value}" for value in values])
    rows, joint = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    kept = {key: array for key, array in arrays.items() if not key.startswith("y")}
    kept["classes"] = np.array(
        [", ".join(own[at] for own, at in zip(names, row, strict=True)) for row in rows]
    )
    counts = [len(arrays[f"y_{columns[0]}{end}"]) for end in ends]
    parts = np.split(joint.reshape(-1).astype(np.int64), np.cumsum(counts)[:-1])
    return kept | {f"y{end}": part for end, part in zip(ends, parts, strict=True)}


def _numbered(origins: np.ndarray) -> torch.Tensor:
    """Numbers from 0 in the order of the sorted names."""
    return torch.from_numpy(np.unique(origins, return_inverse=True)[1].reshape(-1).astype(np.int64))


def _beside(groups: str | None, labels: str) -> str:
    """What the array of origins beside these labels is called: `speaker_train` by `y_train`."""
    return f"{groups}{labels.removeprefix('y')}" if labels.startswith("y") else str(groups)


def _parts(file: Path, found: set[str], groups: str | None = None) -> Sequence[tuple[str, str]]:
    """How training and test images and their labels are called."""
    layouts: Sequence[Sequence[tuple[str, str]]] = _LAYOUTS
    parts = next((p for p in layouts if {name for pair in p for name in pair} <= found), None)
    if parts is None or (len(parts) == 1 and {"x_test", "y_test"} & found):
        raise ValueError(
            f"{shown(file)}: expected arrays x_train, y_train, x_test, y_test (or x and y; or "
            "train_images, train_labels, test_images, test_labels), "
            f"found {listed(sorted(found)) or 'none'}"
        )
    if len(parts) > 1:
        parts = (*parts, *[pair for pair in _VALIDATION if set(pair) <= found][:1])
    read = {name for pair in parts for name in pair} | {_beside(groups, y) for _, y in parts}
    if unread := found - read - {"classes"}:
        logger.warning("%s: arrays that are not read: %s", shown(file), listed(sorted(unread)))
    return parts


@DATASETS.register("image_folder")
def image_folder(
    root: Path | None,
    *,
    path: str = ".",
    size: int = 32,
    grey: bool = False,
    classes: dict[str | int, str] | tuple[str | int, ...] | None = None,
    skip_unreadable: bool = False,
) -> Sets:
    """A folder of pictures, one subfolder per class (torchvision's ImageFolder layout).

    With subfolders `train/` and `test/` (or `val/`) each holds the class folders, and `val/` beside
    both the validation images; without them a fixed fifth per class becomes the test set. A folder
    of one of these names that holds pictures is a class. Names that begin with a dot are passed
    over at every depth. Pictures are turned upright (EXIF) and resized to a square without regard
    to their aspect ratio.

    Args:
        root: Folder that a relative `path` starts from; default: the working directory.
        path: The folder.
        size: Height and width in pixels.
        grey: Read as one grey channel instead of three colours.
        classes: Which are kept, by name, or a mapping from them to new names; None: all.
        skip_unreadable: Leave pictures out that cannot be read, and warn with their number.
    """
    folder = below(root, path)
    if size < 1:
        raise ValueError(f"data set 'image_folder': size must be at least 1, got {size}")
    if folder.is_file():
        raise ValueError(
            f"data set 'image_folder': {shown(folder)} is a file; for a file of arrays take data "
            "set 'npz'"
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data set 'image_folder' misses {shown(folder)}; expected one subfolder of "
            "pictures per class there, or train/ and test/ with such subfolders"
        )
    splits = split_folders(folder)
    read = partial(read_folder, size=size, grey=grey, skip_unreadable=skip_unreadable)
    if splits is None:
        images = read(folder)
        check_several(images, folder)
        return fifth_apart(images.only(classes), shown(folder), "train/ and test/")
    sets = [read(part) for part in splits]
    for part, images in zip(splits[1:], sets[1:]):
        if images.classes != sets[0].classes:
            odd = sorted(set(images.classes) ^ set(sets[0].classes))
            raise ValueError(
                f"{shown(folder)}: {splits[0].name}/ and {part.name}/ differ in their classes: "
                f"{listed(odd)}"
            )
    check_several(sets[0], splits[0])
    return tuple(images.only(classes) for images in sets)


@DATASETS.register("long_tail")
def long_tail(
    root: Path | None, *, of: str | dict[str, Any] = "digits", ratio: float = 10.0
) -> Pair:
    """Another data set with classes that get rarer, for training and for tests.

    The first class keeps all its images, the last one in `ratio`, those between fall evenly on a
    logarithmic scale. Which images stay does not depend on the run's seed.

    Args:
        root: Of the other data set.
        of: Its name, or `{name: npz, path: ...}`.
        ratio: Images of the first class for one of the last.
    """
    if not 1 <= ratio < math.inf:
        raise ValueError(f"data set 'long_tail': ratio must be a number from 1, got {ratio}")
    options = {"name": of} if isinstance(of, str) else dict(of)
    name = options.pop("name", None)
    if not isinstance(name, str) or name == "long_tail":
        raise ValueError(f"data set 'long_tail': of: expected another data set, got {of!r}")
    train, test = load_dataset(name, root, **options)
    return _thinned(train, ratio), _thinned(test, ratio)


def _thinned(images: ImageSet, ratio: float) -> ImageSet:
    if images.labels is None:
        raise ValueError("data set 'long_tail': of: its images have no labels")
    most, kept = images.class_counts().max(), []
    for number in range(len(images.classes)):
        rows = (images.labels == number).nonzero().flatten()
        share = ratio ** (-number / max(len(images.classes) - 1, 1))
        kept.append(rows[: max(1, round(float(most) * share))])
    return images.subset(torch.cat(kept).sort().values)


@DATASETS.register("synthetic")
def synthetic(
    root: Path | None,
    *,
    classes: int = 4,
    size: int = 8,
    channels: int = 1,
    per_class: int = 50,
    noise: float = 0.25,
) -> Pair:
    """Noisy chequered patterns, one per class, for tests; the same whatever the run's seed.

    Args:
        root: Not used.
        classes: Number of classes.
        size: Height and width in pixels.
        channels: 1 (grey) or 3 (colour).
        per_class: Training images per class; there are half as many test images.
        noise: Standard deviation of the pixel noise; patterns span 0 to 1.
    """
    for option, value in {"classes": classes, "size": size, "per_class": per_class}.items():
        if value < 1:
            raise ValueError(f"data set 'synthetic': {option} must be at least 1, got {value}")
    if channels not in (1, 3):
        raise ValueError(f"data set 'synthetic': channels must be 1 or 3, got {channels}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"data set 'synthetic': noise must be a number from 0, got {noise}")
    generator = stream(0, "synthetic", classes, size, channels)
    patterns = torch.rand(classes, channels, 4, 4, generator=generator)
    cell = torch.arange(size) * 4 // size
    patterns = patterns[:, :, cell][:, :, :, cell]
    names = tuple(f"pattern {number}" for number in range(classes))

    def draw(count: int) -> ImageSet:
        labels = torch.arange(classes).repeat(count)
        images = patterns[labels]
        images = images + noise * torch.randn(images.shape, generator=generator)
        return ImageSet(images.clamp(0, 1).mul(255).round().to(torch.uint8), labels, names)

    return draw(per_class), draw(max(1, per_class // 2))


# -- readers -------------------------------------------------------------------------------


def _files(
    root: Path | None, name: str, files: Sequence[str], wanted: Sequence[str], get: str
) -> list[Path]:
    """Absolute paths of `files` (idx files plain or gzipped) below `root`."""
    command = f'python -c "{get.format(root=str(root.absolute()) if root else "FOLDER")}"'
    advice = (
        f"set data.root or FEDKD_DATA to a folder that holds {' or '.join(dict.fromkeys(wanted))}"
        f"; get it with {command}"
    )
    if root is None:
        raise FileNotFoundError(f"data set {name!r} needs a folder of local data: {advice}")
    found, missing = [], []
    for file in files:
        plain = (root / file).absolute()
        # Only the MNIST family's idx files are published gzipped, and read so.
        packed = plain.with_name(plain.name + ".gz") if plain.name.endswith("-ubyte") else plain
        there = next((path for path in (plain, packed) if path.is_file()), None)
        if there is None:
            missing.append(str(plain))
        else:
            found.append(there)
    if missing and not root.is_dir():
        raise FileNotFoundError(
            f"data set {name!r}: there is no folder {shown(root.absolute())}; {advice}"
        )
    if missing:
        raise FileNotFoundError(f"data set {name!r} misses {', '.join(missing)}; {advice}")
    return found


def _idx_pair(root: Path | None, name: str, folder: str, classes: tuple[str, ...]) -> Pair:
    """The MNIST family's four idx files, plain or gzipped."""
    stems = (
        "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
    )  # fmt: skip
    get = f"from fedkd.data.vision import datasets; datasets.{folder}({{root!r}}, download=True)"
    files = [f"{folder}/raw/{stem}" for stem in stems]
    found = _files(root, name, files, [f"{files[0]}(.gz)"], get)
    train, test = (
        image_set(shown(images), _read_idx(images, 3), label_numbers(_read_idx(labels, 1)), classes)
        for images, labels in (found[:2], found[2:])
    )
    return train, test


def _read_idx(file: Path, expected: int) -> np.ndarray:
    """One idx file of unsigned bytes: 0, 0, 8, number of axes, big-endian lengths, values."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            head = stream.read(4)
            axes = head[3] if len(head) > 3 else 0
            head += stream.read(4 * axes)
            lengths = np.frombuffer(head[4:].ljust(4 * axes, b"\0"), ">u4")
            announced = len(head) + math.prod(lengths.tolist())
            size = file.stat().st_size
            if head[:3] == b"\0\0\x08":  # else it is refused as none
                packed = size if file.suffix == ".gz" else None
                check_room(shown(file), announced if packed else min(announced, size), packed)
            else:
                announced = len(head)
            rest = announced - len(head) + 1
            content = head + stream.read(rest if file.suffix == ".gz" else min(rest, size))
    except (OSError, EOFError, zlib.error) as error:
        kind = "gzip file" if file.suffix == ".gz" else "file"
        raise _damaged(file, f"a readable {kind}", error) from None
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start].ljust(4 * axes, b"\0"), ">u4").astype(np.int64)
    if content[:3] != b"\0\0\x08" or len(content) != start + int(shape.prod()):
        raise ValueError(f"{shown(file)}: not a complete idx file of bytes")
    if axes != expected:
        raise ValueError(
            f"{shown(file)}: expected an idx file of {expected} axes, found {axes}; is it the file "
            "of another part?"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape.tolist())


def _cifar(
    root: Path | None, name: str, torch_name: str, folder: str, classes: tuple[str, ...]
) -> Pair:
    get = (
        f"from fedkd.data.vision import datasets; datasets.{torch_name}({{root!r}}, download=True)"
    )
    if root is None or not (root / folder).is_dir():
        (file,) = _files(root, name, [f"{name}.npz"], [folder, f"{name}.npz"], get)
        arrays = read_npz(file)
        absent = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in arrays]
        if absent:
            raise ValueError(f"{shown(file)}: misses {', '.join(absent)}")
        arrays = {key: array for key, array in arrays.items() if key != "classes"}
        train, test = labelled_sets(file, arrays, _TRAIN_TEST, classes)
        return train, test
    from fedkd.data.vision import datasets

    try:
        parts = [
            getattr(datasets, torch_name)(root, train=t, download=False) for t in (True, False)
        ]
    except Exception as error:  # RuntimeError if a checksum differs, others from the pickle
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{(root / folder).absolute()} is incomplete or damaged ({reason}); "
            f'remove it and get it anew with python -c "{get.format(root=str(root.absolute()))}"'
        ) from None
    train, test = (
        ImageSet(as_tensor(part.data), label_numbers(part.targets), classes) for part in parts
    )
    return train, test


def fifth_apart(images: ImageSet, what: str = "", give: str = "") -> Pair:
    """A fixed fifth of every class for testing, the rest for training, in the given order.

    A class of two images or more has at least one test image.

    Args:
        images: Labelled images.
        what: Names them in errors.
        give: What to give instead, likewise.

    Raises:
        ValueError: no class has two images.
    """
    assert images.labels is not None
    held_out = torch.zeros(len(images), dtype=torch.bool)
    for label in range(len(images.classes)):
        rows = (images.labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=stream(0, "test split", label))
        count = max(round(0.2 * len(rows)), int(len(rows) > 1))
        held_out[rows[order[:count]]] = True
    if not held_out.any():
        raise ValueError(
            f"{what}: no test images: a fifth of each class is set apart, but no class has two; "
            f"give {give}, or more images per class"
        )
    return images.subset((~held_out).nonzero().flatten()), images.subset(
        held_out.nonzero().flatten()
    )


def _damaged(file: Path, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{shown(file)}: not {kind} ({reason})")


def below(root: Path | None, path: str) -> Path:
    """The absolute path of the option `path`, which starts from `root` or the working directory.

    Raises:
        ValueError: there can be none.
    """
    try:
        place = ((root or Path()) / Path(path).expanduser()).absolute()
        place.exists()  # raises for what the file system cannot hold, or may not show
    except (OSError, RuntimeError) as error:
        raise ValueError(f"path: {shown(path)[:200]!r} cannot be reached ({error})") from None
    return place
