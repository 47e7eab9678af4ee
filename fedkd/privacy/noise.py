"""Random numbers that a privacy promise may rest on.

Differential privacy holds against whoever cannot predict the noise. PyTorch's and NumPy's
generators do not give that: `torch.Generator.manual_seed` keeps 32 bits of its seed on a CPU, and
the whole state follows from a few hundred outputs. Noise, sampling and randomised labels come from
a cipher's key stream instead.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fedkd.io.extras import extra

# 64-bit words that are drawn at once for samplers which take them one by one.
_BLOCK = 4096


class SecureGenerator:
    """Numbers from the key stream of ChaCha20 under a 256-bit key of the operating system.

    All are made on the CPU; a GPU gets a copy, since its generators are not made for this.

    Args:
        seed: For tests only: the key is the hash of all its bits, and who knows it can take the
            noise away again.
    """

    def __init__(self, seed: int | None = None) -> None:
        with extra("privacy", "noise for a privacy promise"):
            from cryptography.hazmat.primitives.ciphers import Cipher
            from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        key = os.urandom(32) if seed is None else hashlib.sha256(str(seed).encode()).digest()
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._words = self._one_by_one()

    def words(self, count: int) -> np.ndarray:
        """Uniform 64-bit words, uint64 (count,)."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), np.uint64)

    def uniform(self, count: int) -> np.ndarray:
        """Multiples of 2^-53 in [0, 1), all alike, float64 (count,)."""
        numbers: np.ndarray = (self.words(count) >> np.uint64(11)) * 2.0**-53
        return numbers

    def bernoulli(self, probability: float, count: int) -> Tensor:
        """Independent coins, bool (count,); True with `probability`, to within 2^-64."""
        if not 0 <= probability <= 1:
            raise ValueError(f"probability: expected 0 to 1, got {probability}")
        bound = math.floor(Fraction(probability) * 2**64)
        if bound >= 2**64:
            return torch.ones(count, dtype=torch.bool)
        return torch.from_numpy(self.words(count) < np.uint64(bound))

    def integers(self, bound: int, count: int) -> Tensor:
        """Whole numbers from 0 to `bound` - 1, all exactly alike, int64 (count,)."""
        if bound < 1:
            raise ValueError(f"bound: expected at least 1, got {bound}")
        limit = np.uint64(2**64 - 1 - 2**64 % bound)  # words above would favour small numbers
        drawn = self.words(count).copy()
        while (wrong := drawn > limit).any():
            drawn[wrong] = self.words(int(wrong.sum()))
        return torch.from_numpy((drawn % np.uint64(bound)).astype(np.int64))

    def permutation(self, count: int) -> Tensor:
        """The numbers from 0 to `count` - 1 in random order."""
        return torch.from_numpy(np.argsort(self.words(count), kind="stable"))

    def normal(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        """Gaussian noise of mean 0, float64 (Box and Muller 1958)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = np.sqrt(-2 * np.log1p(-self.uniform(half)))
        angle = 2 * math.pi * self.uniform(half)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(deviation * both[:count]).reshape(shape)

    def discrete_gaussian(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        """Whole numbers k with probability proportional to exp(-k^2 / (2 deviation^2)), int64.

        For noise on counts: sums of floats give away more than their value (Mironov, CCS 2012),
        whole numbers do not. Rational arithmetic throughout, so nothing is rounded.

        Raises:
            ValueError: `deviation` is not positive and finite.

        References:
            Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS
                2020, https://arxiv.org/abs/2004.00010, Algorithms 1 to 3
        """
        if not (deviation > 0 and math.isfinite(deviation)):
            raise ValueError(f"deviation: expected more than 0 and finite, got {deviation}")
        variance = Fraction(deviation) ** 2
        scale = math.floor(deviation) + 1
        drawn = [self._discrete_gaussian(variance, scale) for _ in range(math.prod(shape))]
        return torch.tensor(drawn, dtype=torch.int64).reshape(shape)

    def _discrete_gaussian(self, variance: Fraction, scale: int) -> int:
        # exp(-(|y| - variance / scale)^2 / (2 variance)), with one denominator.
        over, under = variance.numerator, variance.denominator
        divisor = 2 * over * under * scale**2
        while True:
            proposed = self._discrete_laplace(scale)
            gap = abs(proposed) * scale * under - over
            if self._exponential(gap * gap, divisor):
                return proposed

    def _discrete_laplace(self, scale: int) -> int:
        while True:
            part = self._below(scale)
            if not self._exponential(part, scale):
                continue
            whole = 0
            while self._exponential(1, 1):
                whole += 1
            size = part + scale * whole
            negative = self._below(2) == 1
            if not (negative and size == 0):
                return -size if negative else size

    def _exponential(self, over: int, under: int) -> bool:
        """True with probability exp(-over / under)."""
        while over > under:
            if not self._exponential(1, 1):
                return False
            over -= under
        tries = 1
        while self._below(under * tries) < over:
            tries += 1
        return tries % 2 == 1

    def _below(self, bound: int) -> int:
        """A whole number from 0 to `bound` - 1, however large `bound` is."""
        bits = (bound - 1).bit_length()
        while True:
            number = 0
            for _ in range(-(-bits // 64)):
                number = number << 64 | next(self._words)
            number &= (1 << bits) - 1
            if number < bound:
                return number

    def _one_by_one(self) -> Iterator[int]:
        while True:
            yield from self.words(_BLOCK).tolist()
