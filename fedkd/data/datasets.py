"""Data sets: functions from a local folder to (training images, test images).

A data set is registered under the name that configs use, takes the folder of local data (or
None) and keyword options, and reads only: nothing is downloaded and nothing is written.
Class names are real ones, in label order.
"""

from __future__ import annotations

import gzip
import importlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkd.data import DATASETS
from fedkd.data.images import ImageSet
from fedkd.data.pictures import SUFFIXES, read_pictures
from fedkd.randomness import stream

Pair = tuple[ImageSet, ImageSet]

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


def load_dataset(name: str, root: str | Path | None = None, **options: Any) -> Pair:
    """The (train, test) images of the data set `name`.

    Args:
        name: A registered data set.
        root: Folder of local data; default: the environment variable FEDKD_DATA.
        **options: Options of the data set.

    Raises:
        ValueError: unknown name or option, or files that are not what they should be.
        FileNotFoundError: files are missing; the message names them and says how to get them.
    """
    place = root or os.environ.get("FEDKD_DATA")
    return DATASETS.create(name, Path(place).expanduser() if place else None, **options)


@DATASETS.register("digits")
def digits(root: Path | None) -> Pair:
    """1797 grey 8x8 digits that come with scikit-learn (1438 to train, 359 to test)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return _split(ImageSet(_tensor(pixels), _labels(bunch.target), DIGITS))


@DATASETS.register("mnist")
def mnist(root: Path | None) -> Pair:
    """MNIST: 60,000 + 10,000 grey 28x28 handwritten digits."""
    return _idx_pair(root, "mnist", "MNIST", DIGITS)


@DATASETS.register("fashion_mnist")
def fashion_mnist(root: Path | None) -> Pair:
    """Fashion-MNIST: 60,000 + 10,000 grey 28x28 pictures of clothing."""
    return _idx_pair(root, "fashion_mnist", "FashionMNIST", FASHION)


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
        "from fedkd.vision import datasets; "
        "[datasets.SVHN({root!r}, s, download=True) for s in ('train', 'test')]"
    )
    files = _files(root, "svhn", names, names, get)
    loadmat = importlib.import_module("scipy.io").loadmat

    sets = []
    for file in files:
        content = loadmat(file)
        labels = content["y"].astype(np.int64).squeeze(1) % 10  # the file calls the digit 0 "10"
        sets.append(ImageSet(_tensor(content["X"].transpose(3, 0, 1, 2)), _labels(labels), DIGITS))
    return sets[0], sets[1]


@DATASETS.register("npz")
def npz(root: Path | None, *, path: str) -> Pair:
    """Your own uint8 arrays in one .npz file.

    The file holds `x_train`, `y_train`, `x_test`, `y_test`, or `x` and `y` alone, of which a
    fixed fifth per class becomes the test set. Images are (N, height, width), (N, height,
    width, channels) or (N, channels, height, width) with 1 or 3 channels (if both readings are
    possible, channels are last); labels count from 0. An array `classes` may name the classes.

    Args:
        root: Folder that a relative `path` starts from; default: the working directory.
        path: The file.
    """
    file = ((root or Path()) / Path(path).expanduser()).absolute()
    if not file.is_file():
        raise FileNotFoundError(
            f"data set 'npz' misses {file}; write it with numpy.savez("
            "path, x_train=..., y_train=..., x_test=..., y_test=...)"
        )
    arrays = read_npz(file)
    if {"x_train", "y_train", "x_test", "y_test"} <= set(arrays):
        parts = ["_train", "_test"]
    elif {"x", "y"} <= set(arrays):
        parts = [""]
    else:
        raise ValueError(
            f"{file}: expected arrays x_train, y_train, x_test, y_test (or x and y), "
            f"found {', '.join(sorted(arrays)) or 'none'}"
        )
    labels = [_labels(arrays[f"y{part}"], f"{file}: y{part}") for part in parts]
    if "classes" in arrays:
        classes = tuple(str(name) for name in arrays["classes"].tolist())
    else:
        last = max((int(y.max()) for y in labels if len(y)), default=-1)
        classes = tuple(str(number) for number in range(last + 1))
    sets = [
        image_set(f"{file}: x{part}", arrays[f"x{part}"], y, classes)
        for part, y in zip(parts, labels, strict=True)
    ]
    if len(sets) == 1:
        return _split(sets[0])
    if sets[0].shape != sets[1].shape:
        raise ValueError(
            f"{file}: training images are {sets[0].shape}, test images {sets[1].shape}"
        )
    return sets[0], sets[1]


@DATASETS.register("image_folder")
def image_folder(root: Path | None, *, path: str = ".", size: int = 32, grey: bool = False) -> Pair:
    """A folder of pictures, one subfolder per class (torchvision's ImageFolder layout).

    With subfolders `train/` and `test/` each holds the class folders; without them a fixed
    fifth per class becomes the test set. Pictures are turned upright (EXIF) and resized to a
    square without regard to their aspect ratio.

    Args:
        root: Folder that a relative `path` starts from; default: the working directory.
        path: The folder.
        size: Height and width in pixels.
        grey: Read as one grey channel instead of three colours.
    """
    folder = ((root or Path()) / Path(path).expanduser()).absolute()
    if size < 1:
        raise ValueError(f"data set 'image_folder': size must be at least 1, got {size}")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data set 'image_folder' misses {folder}; expected one subfolder of pictures per "
            "class there, or train/ and test/ with such subfolders"
        )
    has = [(folder / part).is_dir() for part in ("train", "test")]
    if not any(has):
        return _split(read_folder(folder, size, grey))
    if not all(has):
        there, absent = ("train", "test") if has[0] else ("test", "train")
        raise ValueError(
            f"{folder} has {there}/ but no {absent}/; add it, or point path to {there}/ "
            "to have a fifth of it split off"
        )
    train, test = (read_folder(folder / part, size, grey) for part in ("train", "test"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{folder}: train/ and test/ differ in their classes: {', '.join(odd)}")
    return train, test


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
    root: Path | None, name: str, files: Sequence[str], shown: Sequence[str], get: str
) -> list[Path]:
    """Absolute paths of `files` (idx files plain or gzipped) below `root`."""
    command = f'python -c "{get.format(root=str(root.absolute()) if root else "FOLDER")}"'
    advice = (
        f"set data.root or FEDKD_DATA to a folder that holds {' or '.join(dict.fromkeys(shown))}"
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
    if missing:
        raise FileNotFoundError(f"data set {name!r} misses {', '.join(missing)}; {advice}")
    return found


def _idx_pair(root: Path | None, name: str, folder: str, classes: tuple[str, ...]) -> Pair:
    """The MNIST family's four idx files, plain or gzipped."""
    stems = (
        "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
    )  # fmt: skip
    get = f"from fedkd.vision import datasets; datasets.{folder}({{root!r}}, download=True)"
    files = [f"{folder}/raw/{stem}" for stem in stems]
    arrays = [_read_idx(file) for file in _files(root, name, files, [f"{files[0]}(.gz)"], get)]
    train, test = (
        ImageSet(_tensor(images), _labels(labels), classes)
        for images, labels in (arrays[:2], arrays[2:])
    )
    return train, test


def _read_idx(file: Path) -> np.ndarray:
    """One idx file of unsigned bytes: 0, 0, 8, number of axes, big-endian lengths, values."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a readable gzip file ({error})") from None
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start].ljust(4 * axes, b"\0"), ">u4").astype(np.int64)
    if content[:3] != b"\0\0\x08" or len(content) != start + int(shape.prod()):
        raise ValueError(f"{file}: not a complete idx file of bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape.tolist())


def _cifar(
    root: Path | None, name: str, torch_name: str, folder: str, classes: tuple[str, ...]
) -> Pair:
    get = f"from fedkd.vision import datasets; datasets.{torch_name}({{root!r}}, download=True)"
    if root is None or not (root / folder).is_dir():
        (file,) = _files(root, name, [f"{name}.npz"], [folder, f"{name}.npz"], get)
        arrays = read_npz(file)
        absent = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in arrays]
        if absent:
            raise ValueError(f"{file}: misses {', '.join(absent)}")
        train, test = (
            image_set(
                f"{file}: x_{part}",
                arrays[f"x_{part}"],
                _labels(arrays[f"y_{part}"], f"{file}: y_{part}"),
                classes,
            )
            for part in ("train", "test")
        )
        return train, test
    from fedkd.vision import datasets

    try:
        parts = [
            getattr(datasets, torch_name)(root, train=t, download=False) for t in (True, False)
        ]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{(root / folder).absolute()} is incomplete or damaged ({reason}); "
            f'remove it and get it anew with python -c "{get.format(root=str(root.absolute()))}"'
        ) from None
    train, test = (
        ImageSet(_tensor(part.data), _labels(np.asarray(part.targets)), classes) for part in parts
    )
    return train, test


def read_npz(file: Path) -> Mapping[str, np.ndarray]:
    """The arrays of an .npz file; object arrays (pickles) are refused."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return {key: content[key] for key in content.files}
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not an .npz file of plain arrays ({error})") from None
    except Exception as error:  # zipfile.BadZipFile and AttributeError of a bare .npy
        raise ValueError(f"{file}: not an .npz file ({error})") from None


def image_set(
    what: str, images: np.ndarray, labels: torch.Tensor | None, classes: tuple[str, ...]
) -> ImageSet:
    """Arrays as an image set; `what` names them in errors. Raises `ValueError`."""
    if images.dtype != np.uint8:
        mend = (
            "; convert them, e.g. (x * 255).round().astype('uint8') if they run from 0 to 1"
            if np.issubdtype(images.dtype, np.floating)
            else "; convert them with x.astype('uint8')"
        )
        raise ValueError(f"{what}: expected uint8 pixels (0 to 255), got {images.dtype}{mend}")
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise ValueError(
            f"{what}: expected (N, height, width) or 1 or 3 channels, got {images.shape}"
        )
    try:
        return ImageSet(_tensor(images), labels, classes)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def read_folder(folder: Path, size: int, grey: bool) -> ImageSet:
    """One class per subfolder, in the order of their names."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: no class folders")
    found: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{folder / name}: no pictures ({', '.join(SUFFIXES)})")
        found += files
        labels += [label] * len(files)
    pixels = read_pictures(found, channels=1 if grey else 3, height=size, width=size)
    return ImageSet(_tensor(pixels), _labels(np.asarray(labels)), tuple(names))


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) -> uint8 (N, C, H, W)."""
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(pixels, dtype=np.uint8, order="C"))


def _labels(labels: np.ndarray, what: str = "labels") -> torch.Tensor:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what}: expected whole numbers, got {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return torch.from_numpy(labels.astype(np.int64))


def _split(images: ImageSet) -> Pair:
    """A fixed fifth of every class for testing, the rest for training, in the given order."""
    assert images.labels is not None
    held_out = torch.zeros(len(images), dtype=torch.bool)
    for label in range(len(images.classes)):
        rows = (images.labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=stream(0, "test split", label))
        held_out[rows[order[: round(0.2 * len(rows))]]] = True
    return images.subset((~held_out).nonzero().flatten()), images.subset(
        held_out.nonzero().flatten()
    )
