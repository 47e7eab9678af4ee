"""One class per sample."""

from __future__ import annotations

import math

import numpy as np

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import unsqueeze
from fedkd.knowledge.codecs.int import LogitCodec
from fedkd.knowledge.codecs.topk import class_dtype


@CODECS.register("vote")
class Vote(LogitCodec):
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

    def write(self, logits: np.ndarray) -> bytes:
        """Classes."""
        names = logits.argmax(axis=-1).astype(class_dtype(logits.shape[-1]))
        return names.tobytes()

    def read(self, sent: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The same confidence for every sample."""
        classes, count = shape[-1], int(np.prod(shape[:-1]))
        width = class_dtype(classes)
        names = np.frombuffer(unsqueeze(sent, count * width.itemsize), width).astype(np.int64)
        if count and int(names.max()) >= classes:
            raise ValueError(f"names class {int(names.max())} of {classes}")
        margin = math.log(self.confidence * max(classes - 1, 1) / (1 - self.confidence))
        rows = np.zeros((count, classes), np.float32)
        rows[np.arange(count), names] = margin
        return rows.reshape(shape)
