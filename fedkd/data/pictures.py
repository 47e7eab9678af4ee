"""The one reader of picture files: training folders and prediction see the same pixels."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.io.text import visible

logger = logging.getLogger(__name__)

SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

_DEEP = (
    "not a readable 8-bit picture (mode {} has more than 8 bits per channel); scale it to 0 to 255 "
    "by one rule for all pictures and save it as 8 bits, e.g. numpy: "
    "(x / largest * 255).round().astype('uint8')"
)
_TRANSPARENT = "are partly transparent and are laid on white"
_FRAMES = "have more than one frame or page, of which only the first is read"
_GREY = ("1", "L", "LA", "La")
_ALL_FRAMES_ALIKE = {"MPO", "JPEG"}  # phones put previews and depth maps behind the photograph


def read_picture(
    file: str | Path, *, channels: int, height: int | None = None, width: int | None = None
) -> np.ndarray:
    """One picture file as uint8 (height, width, channels).

    The picture is turned upright (EXIF), laid on white where it is transparent, made grey or
    coloured, and resized without regard to its aspect ratio (bilinear, antialiased). CMYK is
    converted to RGB; of an animation or a document the first frame is read.

    Args:
        file: The file.
        channels: 1 (grey) or 3 (colour).
        height: Rows of the result; None: those of the upright picture.
        width: Columns of the result; None: those of the upright picture.

    Raises:
        ValueError: no such file, no picture, a damaged one, one with more than 8 bits per
            channel, or one with too many pixels; the message is one line that names the file.
    """
    pixels, notes = _read(Path(file), channels, height, width)
    for note in notes:
        logger.warning("%s: such pictures %s", shown(file), note)
    return pixels


def read_pictures(
    files: Sequence[Path],
    *,
    channels: int,
    height: int,
    width: int,
    unreadable: list[int] | None = None,
) -> np.ndarray:
    """Many picture files as uint8 (N, height, width, channels), each as `read_picture` has it.

    Args:
        files: The files.
        channels: As in `read_picture`.
        height: Rows.
        width: Columns.
        unreadable: Takes the numbers of the files that cannot be read, which are then left out,
            with a warning that counts them; None: the first one raises.
    """
    pixels = np.empty((len(files), height, width, channels), np.uint8)
    notes = Notes(len(files))
    kept = 0
    for row, file in enumerate(files):
        try:
            pixels[kept], found = _read(file, channels, height, width)
        except ValueError as error:
            if unreadable is None:
                raise
            unreadable.append(row)
            notes.left_out(str(error))
            continue
        notes.add(found, shown(file))
        kept += 1
    notes.log()
    return pixels[:kept]


class Notes:
    """What is worth a warning about many pictures: each kind once, with a count.

    Args:
        total: How many pictures there are.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._bad: list[str] = []

    def add(self, notes: Sequence[str], where: str) -> None:
        """Count what was found about one picture."""
        self._seen.update(notes)
        for note in notes:
            self._first.setdefault(note, where)

    def left_out(self, reason: str) -> None:
        """Count a picture that cannot be read."""
        self._bad.append(reason)

    def log(self) -> None:
        """Warn. Raises `ValueError` if not one picture was read."""
        for note, count in self._seen.items():
            logger.warning(
                "%d of %d pictures %s (the first is %s)",
                count, self._total, note, self._first[note],
            )  # fmt: skip
        if self._bad and len(self._bad) == self._total:
            raise ValueError(
                f"none of {self._total} pictures can be read; the first: {self._bad[0]}"
            )
        if self._bad:
            logger.warning(
                "%d of %d pictures cannot be read and are left out; the first: %s",
                len(self._bad), self._total, self._bad[0],
            )  # fmt: skip


def pixels_of(
    picture: Any, *, channels: int | None, height: int | None = None, width: int | None = None
) -> tuple[np.ndarray, list[str]]:
    """An opened `PIL.Image` as uint8 (height, width, channels), as `read_picture` has a file.

    Args:
        picture: The picture.
        channels: 1 or 3; None: as many as it has, black and white being grey.
        height: Rows of the result; None: those of the upright picture.
        width: Columns, likewise.

    Returns:
        The pixels, and what is worth a warning about them.

    Raises:
        ValueError: more than 8 bits per channel, or a damaged picture.
    """
    if channels is None:
        channels = 1 if picture.mode in _GREY else 3
    try:
        return _upright(picture, channels, height, width)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # damaged ones make decoders raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not a readable 8-bit picture ({reason})") from None


def is_picture(thing: object) -> bool:
    """Whether it is a `PIL.Image`."""
    from PIL import Image

    return isinstance(thing, Image.Image)


def as_picture(pixels: np.ndarray) -> Any:
    """uint8 (height, width, channels) of 1 to 4 channels as a `PIL.Image`."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def opened(content: bytes) -> Any:
    """The content of a picture file as a `PIL.Image`. Raises `ValueError`."""
    import io

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(content))
            _check_size(picture.size, len(content))
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not a readable 8-bit picture ({reason})") from None
    return picture


def shown(path: str | Path) -> str:
    """A path for a message of one line."""
    return visible(str(path))


def _read(
    file: Path, channels: int, height: int | None, width: int | None
) -> tuple[np.ndarray, list[str]]:
    """The pixels, and what is worth a warning about them."""
    from PIL import Image, UnidentifiedImageError

    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (grey) or 3 (colour), got {channels}")
    name = shown(file)
    try:
        if not file.exists():
            raise ValueError(f"{name}: no such picture file")
        if not file.is_file():  # opening a named pipe would wait for ever
            raise ValueError(f"{name}: expected a picture file, found something else")
    except OSError as error:
        raise ValueError(f"{name}: cannot be reached ({error.strerror})") from None
    try:
        # Pillow warns of large pictures and odd palettes; both are the user's own and read well.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as picture:
                _check_size(picture.size, file.stat().st_size)
                pixels, notes = _upright(picture, channels, height, width)
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name}: too large a picture ({str(error).split(',')[0]}); save it smaller, e.g. with "
            "PIL.Image.thumbnail, or cut it into tiles"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{name}: not a readable 8-bit picture (the content is of no known picture format)"
        ) from None
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: not a readable 8-bit picture ({reason})") from None
    return pixels, notes


def _upright(
    picture: Any, channels: int, height: int | None, width: int | None
) -> tuple[np.ndarray, list[str]]:
    """The pixels of an opened picture. Raises `_Refused`, and whatever a decoder raises."""
    from PIL import Image, ImageOps

    notes = []
    deep = _deep(picture)
    if picture.mode.startswith(("I", "F")):
        raise _Refused(_DEEP.format(picture.mode))
    upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        if np.asarray(layered.getchannel("A")).min() < 255:
            notes.append(_TRANSPARENT)
            white = Image.new("RGBA", layered.size, "white")
            upright = Image.alpha_composite(white, layered).convert("RGB")
    upright = upright.convert("L" if channels == 1 else "RGB")
    if deep and 0 < np.asarray(upright).max() < 16:
        raise _Refused(_DEEP.format(f"{deep} with values of 12 bits or less"))
    columns, rows = upright.size
    size = (width or columns, height or rows)
    if upright.size != size:
        upright = upright.resize(size, Image.Resampling.BILINEAR)
    pixels = np.array(upright, dtype=np.uint8)
    if _has_more_frames(picture):
        notes.append(_FRAMES)
    return pixels.reshape(*pixels.shape[:2], channels), notes


def _has_more_frames(picture: Any) -> bool:
    if picture.format in _ALL_FRAMES_ALIKE:
        return False
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # a damaged later frame is no fault of the first one
        return False


# Pixels that any file may have, and beyond them pixels per byte: of a scan of text some hundreds.
_FEW, _PER_BYTE = 40_000_000, 1000


def _check_size(size: tuple[int, int], there: int) -> None:
    """Raise `_Refused` if so few bytes hold no picture of this size; nothing is unpacked."""
    pixels = size[0] * size[1]
    if pixels > max(_FEW, _PER_BYTE * there):
        raise _Refused(
            f"{there:,} bytes announce {size[0]} x {size[1]} pixels, which no picture has so few "
            "for; save it smaller, e.g. with PIL.Image.thumbnail"
        )


class _Refused(Exception):
    """A picture that is not read; the message says why."""


def _deep(picture: Any) -> str:
    """The raw mode of a colour picture with 16 bits per channel, of which Pillow reads the upper
    8; else nothing."""
    for tile in getattr(picture, "tile", ()):
        arguments = tile[3]
        raw = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
        if isinstance(raw, str) and ";16" in raw:
            return raw
    return ""
