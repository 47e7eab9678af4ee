"""One class per sample."""

from __future__ import annotations

import math

import numpy as np

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import Codec, squeeze, unsqueeze
from fedkd.knowledge.codecs.int import Int
from fedkd.knowledge.codecs.topk import class_dtype


@CODECS.register("vote")
class Vote(Codec):
    """The likeliest class of each sample, entropy coded (CFD's one-bit quantisation).

    Comes back as logits that give that class the probability `confidence`. Only for logits; other
    kinds travel as `int` with 8 bits.

    Args:
        confidence: Between 1 / classes and 1.

    References:
        Sattler et al., "CFD: Communication-Efficient Federated Distillation via Soft-Label
            Quantization and Delta Coding", IEEE TNSE 2022, https://arxiv.org/abs/2012.00632
    """

    def __init__(self, *, confidence: float = 0.9) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"codec 'vote': confidence lies between 0 and 1, got {confidence}")
        self.confidence = confidence
        self._others = Int(bits=8)

    def encode(
        self, values: np.ndarray, *, logits: bool = False, before: np.ndarray | None = None
    ) -> np.ndarray:
        """Classes."""
        if not np.isfinite(values).all():
            return values.astype(np.float32)
        if not logits:
            return self._others.encode(values)
        names = values.argmax(axis=-1).astype(class_dtype(values.shape[-1]))
        return squeeze(names.tobytes())

    def decode(
        self,
        sent: np.ndarray,
        shape: tuple[int, ...],
        *,
        logits: bool = False,
        before: np.ndarray | None = None,
    ) -> np.ndarray:
        """Raises `ValueError` for damaged bytes and unknown classes."""
        if not logits:
            return self._others.decode(sent, shape)
        classes, count = shape[-1], int(np.prod(shape[:-1]))
        width = class_dtype(classes)
        names = np.frombuffer(unsqueeze(sent, count * width.itemsize), width).astype(np.int64)
        if count and int(names.max()) >= classes:
            raise ValueError(f"names class {int(names.max())} of {classes}")
        margin = math.log(self.confidence * max(classes - 1, 1) / (1 - self.confidence))
        rows = np.zeros((count, classes), np.float32)
        rows[np.arange(count), names] = margin
        return rows.reshape(shape)

    def error(self, values: np.ndarray, *, logits: bool = False) -> float:
        """For logits none is promised: only the order of the first survives."""
        return float("inf") if logits else self._others.error(values)
