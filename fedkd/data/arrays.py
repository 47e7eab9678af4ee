"""Images in arrays: .npz files, and what has to be done before they are 8-bit pictures."""

from __future__ import annotations

import logging
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkd.data.images import ImageSet
from fedkd.data.labels import check_range, class_names, label_numbers, number_classes
from fedkd.data.pictures import shown

logger = logging.getLogger(__name__)


class TooLarge(ValueError):
    """A file announces more than is read."""


# A file that unpacks to more than this, and to more than so many times its size, is a trap or one
# colour; below it costs nobody anything.
_HARMLESS, _MOST_TIMES = 64 * 2**20, 100
# Arrays are there twice for a moment: as read, and in the order in which networks take them.
_COPIES = 2


def check_room(what: str, size: int, packed: int | None = None) -> None:
    """Refuse what a file announces, before memory is taken for it.

    Args:
        what: Names the file in errors.
        size: Bytes that it unpacks to.
        packed: Bytes that it has on disk, where it is compressed.

    Raises:
        TooLarge: more than this machine has, or more than images are compressed to.
    """
    if packed is not None and size > max(_HARMLESS, _MOST_TIMES * packed):
        raise TooLarge(
            f"{what}: {packed:,} bytes unpack to {size:,}, more than {_MOST_TIMES} times as many, "
            "as no images do; if they are yours and right, save them uncompressed (numpy.savez)"
        )
    free = _free_memory()
    if free is not None and _COPIES * size > free:
        raise TooLarge(
            f"{what}: holds {size / 1e9:.1f} GB, which take {_COPIES * size / 1e9:.1f} GB of "
            f"memory while they are read; {free / 1e9:.1f} GB are free here: take fewer images, or "
            "a larger machine"
        )


def _free_memory() -> int | None:
    """Bytes that a process can get; None where the system does not report it."""
    found = []
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            found += [int(line.split()[1]) * 1024 for line in lines if line[:12] == "MemAvailable"]
    except (OSError, ValueError):
        return None
    with suppress(OSError, ValueError):  # of a container
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(found, default=None)


def _check_headers(file: Path, name: str) -> None:
    """Look at what the arrays of a file announce, before any is unpacked. Raises `ValueError`."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        check_room(name, sum(p.file_size for p in parts), sum(p.compress_size for p in parts))
        for part in parts:
            with archive.open(part) as stream:
                version = np.lib.format.read_magic(stream)
                if version == (1, 0):
                    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                else:
                    shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
                size, there = math.prod(shape) * dtype.itemsize, part.file_size - stream.tell()
            if size != there and not dtype.hasobject:
                raise ValueError(f"{part.filename} announces {size:,} bytes and has {there:,}")


def read_npz(file: Path) -> Mapping[str, np.ndarray]:
    """The arrays of an .npz file; object arrays (pickles) are refused."""
    name = shown(file)
    try:
        if zipfile.is_zipfile(file):
            _check_headers(file, name)
        with np.load(file, allow_pickle=False) as content:
            return {key: content[key] for key in content.files}
    except TooLarge:
        raise
    except PermissionError:
        raise ValueError(f"{name}: may not be read (permission denied)") from None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        if "Object arrays" in reason:
            reason = "it holds Python objects; save arrays of numbers or of text"
        elif "allow_pickle" in reason:  # NumPy takes whatever it does not know for a pickle
            reason = "its content is of another kind; write it with numpy.savez(path, x=..., y=...)"
        raise ValueError(f"{name}: not an .npz file of plain arrays ({reason})") from None
    except Exception as error:  # zipfile.BadZipFile and AttributeError of a bare .npy
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name}: not an .npz file ({reason}); write it with numpy.savez(path, x=..., y=...)"
        ) from None


def labelled_sets(
    file: Path,
    arrays: Mapping[str, np.ndarray],
    parts: Sequence[tuple[str, str]],
    classes: tuple[str, ...] | None = None,
) -> list[ImageSet]:
    """Labelled images out of the arrays of one file.

    Args:
        file: Named in errors.
        arrays: The images and labels of every part, perhaps `classes`.
        parts: How images and labels are called: `("x_train", "y_train")`.
        classes: What labels without an array `classes` mean; None: they are numbers alone. Where
            these names are numbers themselves, labels are taken by name.

    Raises:
        ValueError: arrays that are not what they should be.
    """
    name = shown(file)
    labels = [label_numbers(arrays[y], f"{name}: {y}") for _, y in parts]
    where = f"{name}: {' and '.join(y for _, y in parts)}"
    if "classes" in arrays:
        classes = names_in(file, arrays)
    elif classes is None:
        labels, classes = number_classes(labels, where)
    elif all(known.isdecimal() and known == str(int(known)) for known in classes):
        labels = [_by_name(part, classes, where) for part in labels]
    for part in labels:
        check_range(part, classes, f"{where}: labels")
    absent = set(range(len(classes))) - set(torch.cat(labels).tolist())
    if "classes" in arrays and absent:
        logger.warning(
            "%s: no image has class %s",
            name,
            ", ".join(classes[row] for row in sorted(absent)[:10]),
        )
    return [
        image_set(f"{name}: {x}", arrays[x], numbers, classes)
        for (x, _), numbers in zip(parts, labels, strict=True)
    ]


def names_in(file: Path, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The names in the array `classes`; numbers are written out."""
    names = arrays["classes"]
    written = names.astype(str) if names.dtype.kind in "iu" else names
    return class_names(written, f"{shown(file)}: classes")


def _by_name(labels: Tensor, classes: tuple[str, ...], what: str) -> Tensor:
    """Positions of numbers in classes that are called by numbers."""
    position = {int(name): row for row, name in enumerate(classes)}
    numbers, rows = labels.unique(return_inverse=True)
    unknown = [number for number in numbers.tolist() if number not in position]
    if unknown:
        raise ValueError(
            f"{what}: labels have to be among the classes {', '.join(classes[:10])}"
            f"{', …' if len(classes) > 10 else ''}, found {unknown[0]}"
        )
    known = torch.tensor([position[number] for number in numbers.tolist()], dtype=torch.int64)
    return known[rows]


def image_set(
    what: str,
    images: np.ndarray,
    labels: Tensor | None,
    classes: tuple[str, ...],
    *,
    may_be_empty: bool = False,
) -> ImageSet:
    """Arrays as an image set; `what` names them in errors. Raises `ValueError`."""
    if images.dtype != np.uint8:
        raise ValueError(
            f"{what}: expected uint8 pixels (0 to 255), got {images.dtype}; {_scaling(images)}"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3):
        if images.shape[-1] not in (1, 3):
            images = images.transpose(0, 2, 3, 1)
        elif images.shape[1:3] != (images.shape[1],) * 2:
            logger.warning(
                "%s: %s may have its channels first or last; they are taken to be last: pictures "
                "%d high and %d wide", what, images.shape, *images.shape[1:3],
            )  # fmt: skip
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise ValueError(
            f"{what}: expected (N, height, width) or 1 or 3 channels, got {images.shape}"
            f"{_reshaping(images.shape)}"
        )
    if 0 in images.shape[1:]:
        raise ValueError(f"{what}: expected pictures of at least one pixel, got {images.shape}")
    if not len(images) and not may_be_empty:
        raise ValueError(f"{what}: no images")
    if len(images) and images.max() == 1:
        logger.warning(
            "%s: all pixels are 0 or 1, nearly the same black; if white is meant to be 1, save "
            "(x * 255).round().astype('uint8') of the values before they became uint8", what,
        )  # fmt: skip
    try:
        return ImageSet(as_tensor(images), labels, classes)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(N, H, W) or (N, H, W, C) -> uint8 (N, C, H, W)."""
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(pixels, dtype=np.uint8, order="C"))


def _scaling(images: np.ndarray) -> str:
    """How to make 8 bits of such pixels without losing what they show."""
    if images.dtype.kind not in "biuf":
        return "save the pixels as numbers"
    if images.dtype.kind == "b":
        return "convert them with x.astype('uint8') * 255"
    if not images.size:
        return "convert them, e.g. (x * 255).round().astype('uint8') if they run from 0 to 1"
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        return "some are not finite: repair or leave out those images before you convert them"
    low, high = images.min().item(), images.max().item()
    span = f"they run from {low:.6g} to {high:.6g}"
    if low < 0:
        normalised = images.dtype.kind == "f" and max(-low, high) <= 10
        reason = (
            "they seem to be normalised already, which fedkd does itself: save the pixels as they "
            "were before, or convert them"
            if normalised
            else "convert them"
        )
        return (
            f"{span}: {reason} by one rule for all images, e.g. "
            f"((x - {low:.6g}) / {high - low:.6g} * 255).round().astype('uint8')"
        )
    if images.dtype.kind == "f":
        if high <= 1:
            return "convert them, e.g. (x * 255).round().astype('uint8') if they run from 0 to 1"
        if high <= 255:
            return f"convert them, e.g. x.round().astype('uint8') ({span})"
    elif high == 1:
        return f"convert them with (x * 255).astype('uint8') ({span})"
    elif high <= 255:
        return "convert them with x.astype('uint8')"
    top = 2 ** math.ceil(math.log2(high + 1)) - 1 if images.dtype.kind in "iu" else high
    return (
        f"convert them by one rule for all images, e.g. (x / {top:.10g} * 255).round()"
        f".astype('uint8') ({span}; a bare astype would keep the lowest 8 bits only)"
    )


def _reshaping(shape: tuple[int, ...]) -> str:
    """What may be wrong with such a shape."""
    if len(shape) == 2:
        for channels in (1, 3):
            side = math.isqrt(shape[1] // channels)
            if side > 0 and channels * side * side == shape[1]:
                form = f"-1, {side}, {side}" if channels == 1 else f"-1, 3, {side}, {side}"
                return f"; rows of pixels become images with x.reshape({form})"
        return "; rows of pixels become images with x.reshape(-1, height, width)"
    if len(shape) == 4 and shape[-1] in (2, 4):
        return (
            f"; is the last of {shape[-1]} channels transparency? x[..., :{shape[-1] - 1}] takes "
            "the colours without it"
        )
    if len(shape) == 4 and shape[1] in (2, 4):
        return (
            f"; is the last of {shape[1]} channels transparency? x[:, :{shape[1] - 1}] takes "
            "the colours without it"
        )
    return ""
