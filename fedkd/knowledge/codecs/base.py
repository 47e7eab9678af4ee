"""The contract of a codec, and the lossless part that several share."""

from __future__ import annotations

import lzma
import zlib
from abc import ABC, abstractmethod

import numpy as np

# One raw LZMA2 stream: no header, no checksum (Flower's transport has its own).
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 2**20}]

Array = np.ndarray
Shape = tuple[int, ...]


class Codec(ABC):
    """float32 numbers to what travels, and back.

    Both directions are deterministic: the same numbers give the same bytes everywhere.

    A codec may treat logits in its own way: only their differences within a row mean anything.

    Attributes:
        remembers: Whether `before` is made use of.
        dtype: Of what travels: bytes in a row, or numbers in the shape of the values.
    """

    remembers: bool = False
    dtype: type[np.generic] = np.uint8

    @abstractmethod
    def encode(self, values: Array, *, logits: bool = False, before: Array | None = None) -> Array:
        """What travels.

        Args:
            values: float32, any shape; for logits the last axis is the class.
            logits: Whether a constant may be taken from every row.
            before: What the receiver holds of the same thing from earlier, as it was decoded.
        """

    @abstractmethod
    def decode(
        self, sent: Array, shape: Shape, *, logits: bool = False, before: Array | None = None
    ) -> Array:
        """float32 numbers of `shape`, or the numbers themselves if that is what travelled.

        Raises:
            ValueError: what was sent cannot be that; nothing larger than `shape` is ever made.
        """

    @abstractmethod
    def error(self, values: np.ndarray, *, logits: bool = False) -> float:
        """Largest difference that may be between `values` and what comes back.

        For logits: after the largest of each row has been taken from it, on both sides.
        """


def centred(values: np.ndarray) -> np.ndarray:
    """Logits less the largest of their row."""
    centre: np.ndarray = values - values.max(axis=-1, keepdims=True)
    return centre


def squeeze(data: bytes) -> np.ndarray:
    """Lossless compression by the better of zlib and LZMA, as uint8 numbers."""
    short = b"z" + zlib.compress(data, 9)
    other = b"x" + lzma.compress(data, format=lzma.FORMAT_RAW, filters=_LZMA)
    return np.frombuffer(min(short, other, b"r" + data, key=len), dtype=np.uint8)


def unsqueeze(sent: np.ndarray, size: int) -> bytes:
    """What `squeeze` was given, which must have `size` bytes.

    Raises:
        ValueError: damaged, or more or fewer bytes; never more than `size + 1` are unpacked.
    """
    if sent.dtype != np.uint8 or sent.ndim != 1 or len(sent) == 0:
        raise ValueError(f"expected a row of bytes, got {sent.dtype} of shape {sent.shape}")
    data = sent.tobytes()
    try:
        if data[:1] == b"z":
            zipped = zlib.decompressobj()
            out = zipped.decompress(data[1:], size + 1)
            finished = zipped.eof and not zipped.unused_data
        elif data[:1] == b"x":
            packed = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
            out = packed.decompress(data[1:], size + 1)
            finished = packed.eof and not packed.unused_data
        elif data[:1] == b"r":
            out, finished = data[1:], True
        else:
            raise ValueError(f"unknown compression {data[:1]!r}")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"damaged bytes ({error})") from None
    if len(out) != size or not finished:
        more = "more than " if len(out) > size else ""
        raise ValueError(f"{more}{min(len(out), size)} bytes unpacked, expected {size}")
    return out
