"""One rule for labels and class names, whoever hands them over: files, folders or Python."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.io.text import nearest

logger = logging.getLogger(__name__)

NUMBERING = "classes, y = numpy.unique(y, return_inverse=True)"
_MARKS = {255, 65535, 2**31 - 1, 2**32 - 1}  # largest numbers of a type: "ignore", "no class"


def class_names(names: Any, what: str = "classes") -> tuple[str, ...]:
    """Class names as a tuple of plain strings; bytes are decoded and accents composed (NFC).

    Args:
        names: Any iterable of names.
        what: Names them in errors.

    Raises:
        ValueError: no names, one that is no text, is empty or cannot be printed, or two alike.
    """
    if isinstance(names, np.ndarray):
        names = names.tolist() if names.ndim == 1 else names
    if isinstance(names, str | bytes | np.ndarray | Tensor) or not isinstance(names, Iterable):
        raise ValueError(f"{what}: expected a list of class names, got {_brief(names)}")
    kept = tuple(_name(name, f"{what}: name {row}") for row, name in enumerate(names))
    if not kept:
        raise ValueError(f"{what}: expected at least one class name, got none")
    seen: set[str] = set()
    for name in kept:
        if name.strip() in seen:
            raise ValueError(f"{what}: two classes are called {_brief(name)}; give each its own")
        seen.add(name.strip())
    return kept


def _name(name: Any, what: str) -> str:
    if isinstance(name, bytes):
        try:
            name = name.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what}: expected UTF-8 text, got {_brief(name)}") from None
    if not isinstance(name, str):
        raise ValueError(
            f"{what}: expected text, got {_brief(name)}; names of other types become text with str"
        )
    if not name.strip():
        raise ValueError(f"{what}: expected a name, got {name!r}")
    # Surrogates (a file name that is no valid text) cannot be written down anywhere.
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ValueError(
            f"{what}: {_brief(name)} has characters that cannot be printed (line breaks, tabs, "
            "control characters); rename the class"
        )
    return unicodedata.normalize("NFC", str(name))


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, for a message of one line."""
    left = len(names) - most
    text = ", ".join(name if len(name) <= 40 else f"{name[:39]}…" for name in names[:most])
    return f"{text} and {left} more" if left > 0 else text


def label_numbers(labels: Any, what: str = "labels") -> Tensor:
    """Labels of any whole-number type, (N,) or (N, 1), as int64 (N,).

    Args:
        labels: Array, tensor or list; a tensor stays on its device.
        what: Names them in errors.

    Raises:
        ValueError: other types and shapes; the message says how to convert them.
    """
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 1:
        return labels
    device = labels.device if isinstance(labels, Tensor) else None
    try:
        array = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{what}: expected whole numbers, got {_brief(labels)} ({error})"
        ) from None
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)  # an empty list has no type of its own
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what}: expected whole numbers, got {array.dtype}{_conversion(array)}")
    if array.ndim != 1:
        raise ValueError(
            f"{what}: expected one whole number per image, (N,) or (N, 1), got shape "
            f"{array.shape}{_conversion(array)}"
        )
    if array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(
            f"{what}: {array.max()} is too large a number; number the classes anew with {NUMBERING}"
        )
    return torch.from_numpy(array.astype(np.int64)).to(device)


def number_classes(
    labels: Sequence[Tensor], what: str = "labels"
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Labels that name their classes by numbers alone -> (labels from 0, class names).

    Numbers from 0 without large gaps stay; a number without any image is a class of its own
    then, with a warning. Others, such as 1 to C or record numbers, are numbered anew and give the
    class its name, with a warning.

    Args:
        labels: Per part (training, test) int64 (N,).
        what: Names them in errors.

    Raises:
        ValueError: negative numbers, or a largest number that usually means "no class".
    """
    numbers = torch.cat(list(labels)).unique()
    if not len(numbers):
        raise ValueError(f"{what}: expected at least one label, got none")
    low, top, count = int(numbers[0]), int(numbers[-1]), len(numbers)
    if low < 0:
        raise ValueError(
            f"{what}: labels have to be classes from 0, found {low}; leave out images without a "
            f"class, or number the classes anew with {NUMBERING}"
        )
    if top in _MARKS and (count == 1 or int(numbers[-2]) != top - 1):
        raise ValueError(
            f"{what}: labels have to be classes from 0, found {count} different ones up to {top}, "
            f"which usually marks images to ignore; leave those out, or number the classes anew "
            f"with {NUMBERING}"
        )
    if low == 0 and top + 1 <= 2 * count:
        absent = sorted(set(range(top + 1)) - set(numbers.tolist()))
        if absent:
            logger.warning(
                "%s: no image has label %s: the student gets classes that nobody holds",
                what, listed([str(number) for number in absent]),
            )  # fmt: skip
        return list(labels), tuple(str(number) for number in range(top + 1))
    names = tuple(str(number) for number in numbers.tolist())
    logger.warning(
        "%s: %d different labels from %d to %d are numbered anew from 0; the classes are called %s",
        what, count, low, top, listed(names),
    )  # fmt: skip
    return [torch.searchsorted(numbers, part) for part in labels], names


def class_places(
    chosen: Sequence[int | str], classes: Sequence[str], what: str = "classes"
) -> tuple[bool, ...]:
    """Which of `classes` are among the chosen names or numbers, (C,).

    Raises:
        ValueError: one that does not exist, one twice, or fewer than two.
    """
    found = [False] * len(classes)
    for each in chosen:
        if isinstance(each, str) and each not in classes:
            raise ValueError(f"{what}: there is no class {each!r}{nearest(each, list(classes))}")
        place = classes.index(each) if isinstance(each, str) else each
        if not 0 <= place < len(classes):
            raise ValueError(f"{what}: classes are 0 to {len(classes) - 1}, got {place}")
        if found[place]:
            raise ValueError(f"{what}: class {classes[place]!r} is listed twice")
        found[place] = True
    if sum(found) < 2:
        raise ValueError(f"{what}: a teacher tells at least two classes apart, got {sum(found)}")
    return tuple(found)


def check_range(labels: Tensor, classes: Sequence[str], what: str = "labels") -> None:
    """Raises `ValueError` unless all labels are positions in `classes`."""
    if not len(labels):
        return
    low, top = int(labels.min()), int(labels.max())
    if low < 0 or top >= len(classes):
        mend = (
            "; labels count from 0: subtract 1"
            if (low, top) == (1, len(classes))
            else f"; labels are positions in the list of classes, 0 to {len(classes) - 1}"
        )
        raise ValueError(
            f"{what} run from {low} to {top}, but there are {len(classes)} classes{mend}"
        )


def _conversion(array: np.ndarray) -> str:
    """How to make whole numbers of such labels."""
    if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "biuf":
        if array.shape[0] == 1:
            return "; make it one axis with y.ravel()"
        if np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all():
            return "; one-hot labels become numbers with y.argmax(axis=1)"
        return "; images of several classes, and soft labels, are not supported: choose one class"
    if array.dtype.kind in "SU":
        return f"; number the classes with {NUMBERING}"
    if array.dtype.kind == "b":
        return "; convert them with y.astype('int64')"
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            return f"; {int((~finite).sum())} of them are not finite: leave those images out"
        if (array == np.round(array)).all():
            return "; they are whole: convert them with y.astype('int64')"
        return "; such values are no classes"
    return ""


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:59] + '…'} ({type(value).__name__})"
