"""Data sets of other libraries, and arrays, as 8-bit pictures: what `ImageSet.from_dataset` does.

torch Datasets, torchvision's, Hugging Face Datasets and arrays are known by what they have, not by
their types: none of these libraries is imported here. Pictures go through the reader of picture
files, so that a student sees in use what it saw in training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.data.labels import class_names, label_numbers, listed, number_classes
from fedkd.data.pictures import Notes, as_picture, is_picture, opened, pixels_of, read_picture
from fedkd.io.text import nearest

logger = logging.getLogger(__name__)

LAYOUTS = ("HWC", "CHW")
# How columns of pictures and labels are called where their types do not tell.
_IMAGES = ("image", "img", "images", "picture", "pixel_values")
_LABELS = ("label", "labels", "target", "targets", "class", "fine_label", "y")
# How far floats may leave their range by rounding, as a share of it.
_ROUNDING = 2e-3


@dataclass(frozen=True)
class Reading:
    """How pixels are to be understood.

    Attributes:
        layout: `HWC` or `CHW`; None: what the shape tells.
        range: Lowest and highest value of pixels that are not uint8.
        mean: Per channel, what was subtracted from pixels in [0, 1].
        std: Per channel, what they were divided by afterwards.
        size: Height and width of the result.
        grey: One channel, or three; None: as the pictures have.
    """

    layout: str | None = None
    range: tuple[float, float] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None
    grey: bool | None = None

    def __post_init__(self) -> None:
        if self.layout not in (None, *LAYOUTS):
            raise ValueError(f"layout: expected HWC or CHW, got {self.layout!r}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: give both, one value per channel, or neither")
        if self.mean is not None and self.range is not None:
            raise ValueError("range: what mean and std undo runs from 0 to 1; leave it out")
        if self.range is not None:
            try:
                low, high = map(float, self.range)
            except (TypeError, ValueError):
                low = high = 0.0
            if not low < high:
                raise ValueError(
                    f"range: expected (lowest, highest), such as (0, 1), got {self.range!r}"
                )
        if self.size is not None and (isinstance(self.size, bool) or int(self.size) < 1):
            raise ValueError(f"size: expected pixels, at least 1, got {self.size!r}")

    @property
    def channels(self) -> int | None:
        """Of the result; None: as the pictures have."""
        return None if self.grey is None else 1 if self.grey else 3


@dataclass(frozen=True)
class Converted:
    """Pictures and what is known of their labels.

    Attributes:
        images: uint8 (N, channels, height, width).
        labels: int64 (N,); None where there are none.
        classes: Names in label order; none where there are no labels and no names.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]


def convert(
    dataset: Any,
    labels: Any,
    reading: Reading,
    *,
    names: Sequence[str] | None,
    image: str | int | None,
    label: str | int | None,
    skip_unreadable: bool,
) -> Converted:
    """Read a whole data set; for the arguments see `ImageSet.from_dataset`."""
    if labels is None and isinstance(dataset, tuple | list) and len(dataset) == 2:
        first, second = dataset
        if _is_array(first) and np.ndim(first) >= 3:
            dataset, labels = first, second
    if _is_array(dataset):
        images = _array(dataset, reading)
        return _labelled(images, labels, names, len(images))
    if labels is not None:
        raise ValueError("labels: only arrays of pictures take them; a data set has its own")
    items = _items(dataset, image, label)
    images, found, kept = _read_items(items, reading, skip_unreadable)
    if not items.labelled:
        found = _rows(getattr(dataset, "targets", None), kept, len(items))
    return _labelled(images, found, names or items.names, len(images))


def declared_names(dataset: Any, label: str | int | None = None) -> tuple[str, ...] | None:
    """Class names that a data set declares, for this column of labels; None where it does not."""
    if hasattr(dataset, "features") and hasattr(dataset, "column_names"):
        column = _label_column(dataset, label)
        feature = None if column is None else dataset.features[column]
        found = getattr(feature, "names", None)
    else:
        found = None
        for _ in range(8):  # torch.utils.data.Subset of a Subset of ...
            found = getattr(dataset, "classes", None)
            if found is not None or not hasattr(dataset, "dataset"):
                break
            dataset = dataset.dataset
    if isinstance(found, list | tuple) and found and all(isinstance(n, str) for n in found):
        return class_names(found)
    return None


# -- items ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Items:
    """What a data set gives, one by one.

    Attributes:
        source: Has `len` and items.
        image: Where in an item the picture is; None: the item is the picture.
        label: Where the label is; None: there is none.
        names: Class names, if the data set declares them.
        files: (path, label) of each item, where the data set only reads files as they are.
    """

    source: Any
    image: str | int | None
    label: str | int | None
    names: tuple[str, ...] | None
    files: Sequence[tuple[Any, Any]] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labelled(self) -> bool:
        return self.label is not None or self.files is not None

    def __iter__(self) -> Iterator[tuple[str, Any, Any]]:
        """(name for messages, picture or the error in its place, label)."""
        for row in range(len(self)):
            if self.files is not None:
                path, label = self.files[row]
                yield str(path), path, label
                continue
            where = f"item {row}"
            try:
                item = self.source[row]
            except Exception as error:  # whatever a decoder or a transform raises
                yield where, error, None
                continue
            picture = item if self.image is None else item[self.image]
            yield where, picture, None if self.label is None else item[self.label]


def _items(dataset: Any, image: str | int | None, label: str | int | None) -> _Items:
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"dataset: expected one data set, got a {type(dataset).__name__} of "
            f"{listed([repr(key) for key in dataset])}; give one of them: dataset[...]"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        stream = "; of a stream take a list of its items, list(...)"
        raise ValueError(
            "dataset: expected an ImageSet, a map-style torch Dataset, a Hugging Face Dataset or "
            f"an array of pictures, got {type(dataset).__name__}"
            f"{stream if hasattr(dataset, '__iter__') else ''}"
        )
    if len(dataset) == 0:
        raise ValueError("dataset: has no images")
    names = declared_names(dataset, label)
    if hasattr(dataset, "features") and hasattr(dataset, "column_names"):
        image = _image_column(dataset, image)
        return _Items(dataset, image, _label_column(dataset, label), names)
    if image is None and label is None and (files := _files(dataset)) is not None:
        return _Items(dataset, None, None, names, files)
    first = _first(dataset) if image is None or label is None else None
    if isinstance(first, Mapping):
        keys = [str(key) for key in first]
        image = _named("image", image, _IMAGES, keys)
        label = next((key for key in _LABELS if key in keys), None) if label is None else label
    elif isinstance(first, tuple | list):
        image = 0 if image is None else image
        label = 1 if label is None and len(first) > 1 else label
    return _Items(dataset, image, label, names)


def _first(dataset: Any) -> Any:
    """An item that can be read; without any, a pair stands for it, and reading says why."""
    for row in range(min(len(dataset), 20)):
        try:
            return dataset[row]
        except Exception:  # whatever a decoder or a transform raises
            continue
    return (None, None)


def _files(dataset: Any) -> Sequence[tuple[Any, Any]] | None:
    """The files behind torchvision's folders of pictures, if nothing is done to them."""
    rows = None
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):  # a Subset
        own = list(dataset.indices)
        rows = own if rows is None else [own[row] for row in rows]
        dataset = dataset.dataset
    samples, loader = getattr(dataset, "samples", None), getattr(dataset, "loader", None)
    untouched = all(
        getattr(dataset, name, None) is None for name in ("transform", "target_transform")
    )
    if not isinstance(samples, list) or not samples or not untouched:
        return None
    if getattr(loader, "__name__", "") != "default_loader":
        return None
    return samples if rows is None else [samples[row] for row in rows]


def _image_column(dataset: Any, given: str | int | None) -> str:
    typed = [n for n, f in dataset.features.items() if type(f).__name__ in ("Image", "Array3D")]
    if given is None and len(typed) == 1:
        return str(typed[0])
    return _named("image", given, typed or _IMAGES, list(dataset.column_names))


def _label_column(dataset: Any, given: str | int | None) -> str | None:
    columns = list(dataset.column_names)
    typed = [n for n, f in dataset.features.items() if type(f).__name__ == "ClassLabel"]
    if given is not None:
        return _named("label", given, (), columns)
    if len(typed) > 1:
        raise ValueError(
            f"label: the data set has several columns of classes, {listed(typed)}; name one of "
            f"them, e.g. label={typed[0]!r}"
        )
    return next((name for name in (*typed, *_LABELS) if name in columns), None)


def _named(
    what: str, given: str | int | None, candidates: Sequence[str], columns: Sequence[str]
) -> str:
    """The column that was named, or the only candidate there is."""
    if given is not None:
        if given not in columns:
            hint = nearest(str(given), list(columns))
            raise ValueError(
                f"{what}: there is no column {given!r}{hint} (columns: {listed(columns)})"
            )
        return str(given)
    found = [name for name in candidates if name in columns]
    if len(found) != 1:
        raise ValueError(
            f"{what}: which column holds the {what}s? There are {listed(columns)}; name it, "
            f"{what}=..."
        )
    return found[0]


def _read_items(
    items: _Items, reading: Reading, skip_unreadable: bool
) -> tuple[Tensor, list[Any], list[int]]:
    """Pixels, labels and numbers of the items that could be read."""
    notes = Notes(len(items))
    pixels: np.ndarray | None = None
    labels: list[Any] = []
    kept: list[int] = []
    channels = reading.channels or (3 if items.files is not None else _channels(items, reading))
    # Where all that was looked at is grey, a coloured picture further on is not made grey unasked.
    asked = None if channels == 1 and reading.grey is None else channels
    floats = False
    for row, (where, thing, label) in enumerate(items):
        try:
            read, found = _pixels(thing, where, reading, asked)
        except _Unreadable as error:
            if not skip_unreadable:
                raise ValueError(
                    f"{error}; leave such pictures out with skip_unreadable=True"
                ) from None
            notes.left_out(str(error))
            continue
        notes.add(found, where)
        floats = floats or _is_float(thing)
        if read.shape[2] != channels:
            raise ValueError(
                f"{where}: is coloured, the pictures before it are grey; say which all of them are "
                "to be with grey=True or grey=False"
            )
        if pixels is None:
            _check_square(read, where, reading)
            pixels = np.empty((len(items), *read.shape), np.uint8)
        elif read.shape != pixels.shape[1:]:
            raise ValueError(
                f"{where}: is {_shape(read)}, the first picture is {_shape(pixels[0])}; bring them "
                "to one size with size=..., e.g. size=32"
            )
        pixels[len(kept)] = read
        labels.append(label)
        kept.append(row)
    notes.log()
    assert pixels is not None
    pixels = pixels[: len(kept)]
    _check_bright(pixels, reading, floats)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, kept


def _channels(items: _Items, reading: Reading) -> int:
    """1 if the first pictures that can be read are grey, else 3."""
    for count, (where, thing, _) in enumerate(items):
        try:
            read, _notes = _pixels(thing, where, reading, None)
        except _Unreadable:
            continue
        if read.shape[2] != 1:
            return 3
        if count >= 20:
            break
    return 1


class _Unreadable(ValueError):
    """A picture that cannot be read."""


def _pixels(
    thing: Any, where: str, reading: Reading, channels: int | None
) -> tuple[np.ndarray, list[str]]:
    """One picture as uint8 (height, width, channels), and what is worth a warning about it."""
    if isinstance(thing, Exception):
        reason = " ".join(str(thing).split()) or type(thing).__name__
        raise _Unreadable(f"{where}: cannot be read ({reason})")
    size = reading.size
    if isinstance(thing, Mapping) and {"bytes", "path"} <= set(thing):  # not decoded yet
        where = str(thing["path"] or where)
        thing = thing["path"] if thing["bytes"] is None else bytes(thing["bytes"])
    try:
        if isinstance(thing, bytes | bytearray):
            thing = opened(bytes(thing))
        elif isinstance(thing, str) or hasattr(thing, "__fspath__"):
            channels = channels or 3
            return read_picture(thing, channels=channels, height=size, width=size), []
        if is_picture(thing):
            return pixels_of(thing, channels=channels, height=size, width=size)
    except ValueError as error:
        text = str(error)
        raise _Unreadable(text if text.startswith(where) else f"{where}: {text}") from None
    if not _is_array(thing):
        if isinstance(thing, list):  # how Hugging Face gives an Array3D
            thing = np.asarray(thing)
        else:
            raise ValueError(
                f"{where}: expected a picture (PIL, tensor or array), got {type(thing).__name__}"
            )
    array = _uint8(_laid_out(_numpy(thing), where, reading), where, reading)
    return _conformed(array, channels, size)


# -- arrays --------------------------------------------------------------------------------


def _is_array(thing: Any) -> bool:
    return isinstance(thing, Tensor | np.ndarray)


def _numpy(thing: Any) -> np.ndarray:
    return thing.numpy(force=True) if isinstance(thing, Tensor) else np.asarray(thing)


def _array(given: Any, reading: Reading) -> Tensor:
    """(N, h, w), (N, h, w, C) or (N, C, h, w) as uint8 (N, C, h, w)."""
    array = _numpy(given)
    if array.ndim not in (3, 4) or not len(array):
        raise ValueError(
            "dataset: expected an array of pictures, (N, height, width), (N, height, width, "
            f"channels) or (N, channels, height, width), got {array.shape}"
            + ("; one picture is array[None]" if array.ndim == 2 else "")
        )
    array = _laid_out(array, "images", reading, batch=True)
    channels = reading.channels or (1 if array.shape[3] == 1 else 3)
    _check_square(array[0], "images", reading)
    parts = []
    for start in range(0, len(array), 1000):  # a float copy of the whole array is eight times it
        part = _uint8(array[start : start + 1000], "images", reading)
        if part.shape[3] != channels or part.shape[1:3] != _sized(part, reading):
            part = np.stack([_conformed(one, channels, reading.size)[0] for one in part])
        parts.append(part)
    pixels = np.concatenate(parts)
    _check_bright(pixels, reading, _is_float(given))
    return torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))


def _laid_out(
    array: np.ndarray, where: str, reading: Reading, *, batch: bool = False
) -> np.ndarray:
    """Channels last, whatever the layout."""
    shape = array.shape[1:] if batch else array.shape
    if 0 in shape or len(shape) not in (2, 3):
        raise ValueError(
            f"{where}: expected (height, width) or 1 or 3 channels beside them, got {shape}"
        )
    if len(shape) == 2:
        return array[..., None]
    # Four channels (the last is transparency) only where there are not one or three.
    counts = (1, 3) if {shape[0], shape[2]} & {1, 3} else (4,)
    first, last = shape[0] in counts, shape[2] in counts
    layout = reading.layout
    if layout is None:
        if first and last:
            raise ValueError(
                f"{where}: {shape} may have its channels first or last; say which with "
                'layout="CHW" or layout="HWC"'
            )
        if not first and not last:
            raise ValueError(f"{where}: expected 1 or 3 channels, got {shape}")
        layout = "CHW" if first else "HWC"
    elif not (first if layout == "CHW" else last):
        raise ValueError(f"{where}: layout={layout!r}: expected 1 or 3 channels, got {shape}")
    return np.moveaxis(array, 1 if batch else 0, -1) if layout == "CHW" else array


def _uint8(array: np.ndarray, where: str, reading: Reading) -> np.ndarray:
    """Pixels from 0 to 255 by the range that was stated. Raises `ValueError` if none was."""
    if array.dtype == np.uint8 and reading.range in (None, (0, 255)) and reading.mean is None:
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected numbers as pixels, got {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{where}: some pixels are not finite; repair or leave out those pictures")
    values = array.astype(np.float64)
    found = f"{array.dtype} from {values.min():.4g} to {values.max():.4g}"
    if reading.mean is not None and reading.std is not None:
        channels = array.shape[-1]
        if len(reading.mean) != channels or len(reading.std) != channels:
            raise ValueError(
                f"mean and std: expected {channels} values each, as many as there are channels, "
                f"got {len(reading.mean)} and {len(reading.std)}"
            )
        values = values * np.asarray(reading.std) + np.asarray(reading.mean)
        low, high, how = 0.0, 1.0, "mean and std leave"
    elif reading.range is not None:
        (low, high), how = reading.range, f"range={tuple(reading.range)!r} was stated for"
    elif array.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        (low, high), how = (0.0, 1.0), ""  # as of ToTensor; see `_check_bright`
    else:
        raise ValueError(
            f"{where}: pixels are {found}; say what black and white are with range=(0, 1), "
            "range=(-1, 1), range=(0, 255), ..., or undo a normalisation with mean=..., std=..."
        )
    slack = _ROUNDING * (high - low)
    if values.min() < low - slack or values.max() > high + slack:
        raise ValueError(
            f"{where}: {how} pixels from {values.min():.4g} to {values.max():.4g} ({found})"
        )
    return ((values - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)


def _conformed(
    array: np.ndarray, channels: int | None, size: int | None
) -> tuple[np.ndarray, list[str]]:
    """uint8 (h, w, C) in the channels and the size that are wanted, by the reader of pictures."""
    channels = channels or (1 if array.shape[2] == 1 else 3)
    if array.shape[2] == channels and (size is None or array.shape[:2] == (size, size)):
        return array, []
    return pixels_of(as_picture(array), channels=channels, height=size, width=size)


def _sized(pixels: np.ndarray, reading: Reading) -> tuple[int, ...]:
    return pixels.shape[1:3] if reading.size is None else (reading.size, reading.size)


def _is_float(thing: Any) -> bool:
    return _is_array(thing) and _numpy(thing).dtype.kind == "f"


def _check_bright(pixels: np.ndarray, reading: Reading, floats: bool) -> None:
    """Floats whose range nobody stated run from 0 to 1 only if some are well above 0."""
    if floats and reading.range is None and reading.mean is None and pixels.max() < 128:
        raise ValueError(
            f"images: floats from 0 to {pixels.max() / 255:.3g}, which may be pictures of any "
            "range; say what black and white are with range=(0, 1), range=(0, 255), ..."
        )


def _check_square(pixels: np.ndarray, where: str, reading: Reading) -> None:
    height, width = pixels.shape[:2]
    if reading.size is None and height != width:
        raise ValueError(
            f"{where}: is {height}x{width}, networks here take square pictures; resize them with "
            f"size=..., e.g. size={min(height, width)}"
        )


def _shape(pixels: np.ndarray) -> str:
    height, width, channels = pixels.shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


# -- labels --------------------------------------------------------------------------------


def _rows(targets: Any, kept: list[int], total: int) -> Any:
    """Labels of the rows that were read; None where there are none."""
    if targets is None or len(targets) != total:
        return None
    return [targets[row] for row in kept]


def _labelled(images: Tensor, labels: Any, names: Sequence[str] | None, count: int) -> Converted:
    known = None if names is None else class_names(names, "names")
    if labels is None or (isinstance(labels, list) and all(one is None for one in labels)):
        return Converted(images, None, known or ())
    if isinstance(labels, list):
        labels = [one.item() if _is_array(one) and one.ndim == 0 else one for one in labels]
        if any(_is_array(one) for one in labels):
            labels = np.stack([np.asarray(one) for one in labels])
    texts = (
        labels.tolist() if isinstance(labels, np.ndarray) and labels.dtype.kind == "U" else labels
    )
    if isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts):
        known = known or class_names(sorted(set(texts)), "labels")
        place = {name: number for number, name in enumerate(known)}
        strange = sorted(set(texts) - set(place))
        if strange:
            raise ValueError(f"labels: {listed(strange)} are not among the names {listed(known)}")
        return Converted(images, torch.tensor([place[one] for one in texts]), known)
    numbers = label_numbers(labels)
    if len(numbers) != count:
        raise ValueError(f"labels: {len(numbers)} for {count} pictures")
    if bad := int((numbers < 0).sum()):
        raise ValueError(
            f"labels: {bad} of {count} are negative, as of pictures without a class (a test split "
            "that is not labelled?); leave those out, or take another split"
        )
    if known is None:
        (numbers,), known = number_classes([numbers])
    return Converted(images, numbers, known)
