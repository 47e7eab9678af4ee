"""The likeliest classes only."""

from __future__ import annotations

import numpy as np

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import unsqueeze
from fedkd.knowledge.codecs.int import LogitCodec

_FLOOR = -16.0  # log-probability of what is called impossible


@CODECS.register("topk")
class TopK(LogitCodec):
    """Of each sample the `k` largest probabilities, in 8 bits; the rest is spread evenly.

    Probabilities differ by no more than what lies outside the k largest. Only for logits; other
    kinds travel as `int` with 8 bits.

    Args:
        k: Classes per sample.
    """

    def __init__(self, *, k: int = 3) -> None:
        if k < 1:
            raise ValueError(f"codec 'topk': k must be at least 1, got {k}")
        self.k = k

    def write(self, logits: np.ndarray) -> bytes:
        """Classes, then their log-probabilities, likeliest first."""
        classes = logits.shape[-1]
        k = min(self.k, classes)
        rows = logits.reshape(-1, classes).astype(np.float64)
        chosen = np.argsort(-rows, axis=1, kind="stable")[:, :k]
        logs = np.take_along_axis(_log_softmax(rows), chosen, axis=1)
        codes = np.rint(np.clip(logs, _FLOOR, 0) / _FLOOR * 255).astype(np.uint8)
        names = chosen.astype(class_dtype(classes))
        return names.T.tobytes() + codes.T.tobytes()

    def read(self, sent: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Log-probabilities."""
        classes = shape[-1]
        k, count = min(self.k, classes), int(np.prod(shape[:-1]))
        width = class_dtype(classes)
        size = count * k * width.itemsize
        data = unsqueeze(sent, size + count * k)
        chosen = np.frombuffer(data, width, count=count * k).reshape(k, count).T.astype(np.int64)
        if count and (int(chosen.max()) >= classes or _repeats(chosen)):
            raise ValueError(f"names classes that are not {k} different ones of {classes}")
        codes = np.frombuffer(data, np.uint8, offset=size).reshape(k, count).T
        logs = codes.astype(np.float64) / 255 * _FLOOR
        rest = np.maximum(1 - np.exp(logs).sum(axis=1, keepdims=True), 0)
        floor = np.maximum(np.log(np.maximum(rest, 1e-300) / max(classes - k, 1)), _FLOOR)
        # Nobody outside may look likelier than the last one inside.
        rows = np.broadcast_to(np.minimum(floor, logs[:, -1:]), (count, classes)).copy()
        np.put_along_axis(rows, chosen, logs, axis=1)
        return rows.reshape(shape).astype(np.float32)


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def class_dtype(classes: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that can name a class."""
    return np.dtype("u1" if classes <= 256 else "<u2" if classes <= 65536 else "<u4")


def _repeats(chosen: np.ndarray) -> bool:
    ordered = np.sort(chosen, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())
