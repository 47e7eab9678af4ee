"""What has changed since last time."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import Array, Codec, Shape, centred, squeeze, unsqueeze

_LENGTH = struct.Struct("<I")


@CODECS.register("delta")
class Delta(Codec):
    """Only samples whose answer has changed; the receiver keeps the rest from last time.

    Compared is what the receiver would decode, so both sides stay in step. Without anything from
    last time everything is sent.

    Args:
        inner: Codec of the samples that are sent, as in the config.
        tolerance: Changes up to this much (in any of a sample's numbers; of logits in nats) are
            not worth sending.

    References:
        Delta coding: Sattler et al., CFD, https://arxiv.org/abs/2012.00632; cached answers:
            Azuma et al., SCARLET, https://arxiv.org/abs/2504.19602
    """

    remembers = True

    def __init__(self, *, inner: str | dict[str, Any] = "int", tolerance: float = 0.0) -> None:
        if not 0 <= tolerance < np.inf:
            raise ValueError(f"codec 'delta': tolerance must not be negative, got {tolerance}")
        options = {"name": inner} if isinstance(inner, str) else dict(inner)
        name = str(options.pop("name", ""))
        if name == "delta":
            raise ValueError("codec 'delta': inner must be another codec")
        self.inner = CODECS.create(name, **options)
        self.tolerance = tolerance

    def encode(self, values: Array, *, logits: bool = False, before: Array | None = None) -> Array:
        """A bit per sample, then the samples that changed."""
        if not np.isfinite(values).all():
            return values.astype(np.float32)
        values = np.atleast_1d(values)  # a fact may be a single number
        before = None if before is None else np.atleast_1d(before)
        changed = np.ones(len(values), bool)
        if before is not None and before.shape == values.shape:
            whole = self.inner.encode(values, logits=logits)
            after = self.inner.decode(whole, values.shape, logits=logits)
            gap = np.abs(_comparable(after, logits) - _comparable(before, logits))
            changed = gap.reshape(len(values), -1).max(axis=1, initial=0.0) > self.tolerance
        bits = squeeze(np.packbits(changed).tobytes()).tobytes()
        rows = self.inner.encode(values[changed], logits=logits).tobytes() if changed.any() else b""
        return np.frombuffer(_LENGTH.pack(len(bits)) + bits + rows, np.uint8)

    def decode(
        self, sent: Array, shape: Shape, *, logits: bool = False, before: Array | None = None
    ) -> Array:
        """Raises `ValueError` for damaged bytes, or if something is missing from last time."""
        if not shape:
            last = None if before is None else np.atleast_1d(before)
            return self.decode(sent, (1,), before=last).reshape(())
        if sent.dtype != np.uint8 or sent.ndim != 1 or len(sent) < _LENGTH.size:
            raise ValueError(f"expected a row of bytes, got {sent.dtype} of shape {sent.shape}")
        data = sent.tobytes()
        (length,) = _LENGTH.unpack_from(data)
        middle = _LENGTH.size + length
        if middle > len(data):
            raise ValueError("damaged bytes (shorter than announced)")
        packed = np.frombuffer(data[_LENGTH.size : middle], np.uint8)
        bits = np.frombuffer(unsqueeze(packed, -(-shape[0] // 8)), np.uint8)
        changed = np.unpackbits(bits)[: shape[0]].astype(bool)
        if not changed.all() and (before is None or before.shape != shape):
            raise ValueError("answers of last time are missing")
        result = np.zeros(shape, np.float32) if before is None else before.astype(np.float32)
        if changed.any():
            wanted = (int(changed.sum()), *shape[1:])
            rest = data[middle:]
            if len(rest) % np.dtype(self.inner.dtype).itemsize:
                raise ValueError("damaged bytes (cut)")
            rows = np.frombuffer(rest, self.inner.dtype)
            if self.inner.dtype is not np.uint8:
                if rows.size != int(np.prod(wanted)):
                    raise ValueError(f"{rows.size} numbers, expected {wanted}")
                rows = rows.reshape(wanted)
            result[changed] = self.inner.decode(rows, wanted, logits=logits)
        elif len(data) != middle:
            raise ValueError("damaged bytes (longer than announced)")
        return result

    def error(self, values: np.ndarray, *, logits: bool = False) -> float:
        """That of the samples sent, and the tolerance."""
        return self.inner.error(values, logits=logits) + self.tolerance


def _comparable(values: np.ndarray, logits: bool) -> np.ndarray:
    wide = values.astype(np.float32)
    return centred(wide) if logits else wide
