"""Few bits a number, evenly spaced."""

from __future__ import annotations

import struct
from abc import abstractmethod
from typing import Literal

import numpy as np

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import Array, Codec, Shape, centred, squeeze, unsqueeze

_RANGE = struct.Struct("<ff")


@CODECS.register("int")
class Int(Codec):
    """Each number is one of `2^bits` evenly spaced ones; equal ones in a row compress well.

    Logits are measured down from the largest of their row, and what lies more than `depth` below
    it (less than one part in 150,000 of the probability) is cut there. Other kinds are spaced
    between their smallest and largest number.

    Args:
        bits: 8, 4 or 2 per number, before compression.
        depth: Of logits, in nats.
    """

    def __init__(self, *, bits: Literal[8, 4, 2] = 8, depth: float = 12.0) -> None:
        if bits not in (8, 4, 2):
            raise ValueError(f"codec 'int': bits is 8, 4 or 2, got {bits!r}")
        if not 0 < depth < np.inf:
            raise ValueError(f"codec 'int': depth must be positive, got {depth}")
        self.bits = bits
        self.depth = depth
        self.levels = 2**bits - 1

    def encode(self, values: Array, *, logits: bool = False, before: Array | None = None) -> Array:
        """Range, then one code per number, all samples of a class together."""
        if not np.isfinite(values).all():  # sent as plain numbers, to be refused as such
            return values.astype(np.float32)
        low, high = self._range(values, logits)
        shifted = np.clip(centred(values), low, high) if logits else values
        step = (high - low) / self.levels
        codes = np.rint((shifted - low) / step) if step > 0 else np.zeros_like(shifted)
        return squeeze(_RANGE.pack(low, high) + self._join(codes.astype(np.uint8)))

    def decode(
        self, sent: Array, shape: Shape, *, logits: bool = False, before: Array | None = None
    ) -> Array:
        """Raises `ValueError` for damaged bytes and impossible ranges."""
        count = int(np.prod(shape))
        per_byte = 8 // self.bits
        data = unsqueeze(sent, _RANGE.size + -(-count // per_byte))
        low, high = _RANGE.unpack_from(data)
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise ValueError(f"impossible range {low} to {high}")
        codes = self._split(np.frombuffer(data, np.uint8, offset=_RANGE.size), count)
        step = np.float32((high - low) / self.levels)
        values = np.float32(low) + codes.astype(np.float32) * step
        columns = values.reshape(shape[::-1]).T
        return np.ascontiguousarray(columns, dtype=np.float32).reshape(shape)

    def error(self, values: np.ndarray, *, logits: bool = False) -> float:
        """Half a step; for logits below `depth`, what was cut."""
        low, high = self._range(values, logits)
        half = (high - low) / self.levels / 2 * (1 + 1e-3) + 1e-6
        if not logits:
            return half
        return max(half, -float(centred(values).min(initial=0.0)) - self.depth + half)

    def _range(self, values: np.ndarray, logits: bool) -> tuple[float, float]:
        if logits:
            return -float(np.float32(self.depth)), 0.0
        if values.size == 0:
            return 0.0, 0.0
        return float(np.float32(values.min())), float(np.float32(values.max()))

    def _join(self, codes: np.ndarray) -> bytes:
        flat = codes.T.reshape(-1)
        per_byte = 8 // self.bits
        flat = np.concatenate([flat, np.zeros(-len(flat) % per_byte, np.uint8)])
        joined = np.zeros(len(flat) // per_byte, np.uint8)
        for place in range(per_byte):
            joined |= flat[place::per_byte] << np.uint8(place * self.bits)
        return joined.tobytes()

    def _split(self, joined: np.ndarray, count: int) -> np.ndarray:
        per_byte = 8 // self.bits
        places = np.arange(per_byte, dtype=np.uint8) * np.uint8(self.bits)
        codes: np.ndarray = (joined[:, None] >> places) & np.uint8(self.levels)
        return codes.reshape(-1)[:count]


class LogitCodec(Codec):
    """A codec of logits alone; other kinds travel as `int` with 8 bits."""

    _others = Int(bits=8)

    @abstractmethod
    def write(self, logits: np.ndarray) -> bytes:
        """Finite logits, the class in the last axis."""

    @abstractmethod
    def read(self, sent: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Logits of `shape`. Raises `ValueError` for damaged bytes and unknown classes."""

    def encode(self, values: Array, *, logits: bool = False, before: Array | None = None) -> Array:
        """Bytes; numbers that are not finite as they are, to be refused as that."""
        if not np.isfinite(values).all():
            return values.astype(np.float32)
        return squeeze(self.write(values)) if logits else self._others.encode(values)

    def decode(
        self, sent: Array, shape: Shape, *, logits: bool = False, before: Array | None = None
    ) -> Array:
        """What was written. Raises `ValueError` for damaged bytes and unknown classes."""
        return self.read(sent, shape) if logits else self._others.decode(sent, shape)

    def error(self, values: np.ndarray, *, logits: bool = False) -> float:
        """No bound for logits: it is the likeliest classes that come back."""
        return float("inf") if logits else self._others.error(values)
