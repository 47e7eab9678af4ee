"""Half precision, as it is."""

from __future__ import annotations

import numpy as np

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import Array, Codec, Shape


class Plain(Codec):
    """Numbers of a smaller type; shapes stay readable on the wire."""

    dtype: type[np.floating] = np.float32

    def encode(self, values: Array, *, logits: bool = False, before: Array | None = None) -> Array:
        """The same numbers; what does not fit becomes infinite, and is refused as that."""
        with np.errstate(over="ignore"):
            return values.astype(self.dtype)

    def decode(
        self, sent: Array, shape: Shape, *, logits: bool = False, before: Array | None = None
    ) -> Array:
        """The same numbers."""
        if sent.dtype != np.dtype(self.dtype):
            raise ValueError(f"dtype {sent.dtype}, expected {np.dtype(self.dtype)}")
        if sent.shape != shape:
            raise ValueError(f"shape {sent.shape}, expected {shape}")
        return sent

    def error(self, values: np.ndarray, *, logits: bool = False) -> float:
        """Half a unit in the last place of the largest number."""
        largest = float(np.abs(values.astype(np.float32)).max(initial=0.0))
        return largest * float(np.finfo(self.dtype).eps) / 2 + float(np.finfo(self.dtype).tiny)


@CODECS.register("float16")
class Float16(Plain):
    """Two bytes a number: some three digits."""

    dtype = np.float16
