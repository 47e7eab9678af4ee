"""Noise that a promise rests on: as random, and distributed, as it says."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.gaussian import delta_of


def _not_refuted(observed: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square at one in a million; seeds are fixed, so a pass stays a pass."""
    expected = expected * observed.sum() / expected.sum()
    assert stats.chisquare(observed, expected).pvalue > 1e-6


@pytest.mark.parametrize("other", [1 << 32, 1 << 63, 1 << 64, 1 << 127])
def test_every_bit_of_a_seed_matters(other: int) -> None:
    # What torch.Generator.manual_seed keeps of a seed on the CPU are 32 bits.
    same = torch.rand(9, generator=torch.Generator().manual_seed(5 + (1 << 32)))
    assert torch.equal(same, torch.rand(9, generator=torch.Generator().manual_seed(5)))
    first, second = SecureGenerator(5), SecureGenerator(5 + other)
    assert not torch.equal(first.normal((9,), 1.0), second.normal((9,), 1.0))
    assert not np.array_equal(first.words(9), second.words(9))


def test_a_seed_repeats_and_without_one_nothing_does() -> None:
    assert np.array_equal(SecureGenerator(1).words(64), SecureGenerator(1).words(64))
    drawn = [SecureGenerator().words(4).tobytes() for _ in range(20)]
    assert len(set(drawn)) == 20


def test_the_key_stream_is_chacha20() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    # RFC 8439, A.1, test vector 1: the key stream of the zero key and nonce.
    stream = Cipher(ChaCha20(bytes(32), bytes(16)), mode=None).encryptor().update(bytes(8))
    assert stream.hex() == "76b8e0ada0f13d90"


def test_normal_noise_has_the_normal_distribution() -> None:
    noise = SecureGenerator(0).normal((200, 1001), 3.0)
    assert noise.shape == (200, 1001)
    assert noise.dtype == torch.float64
    edges = stats.norm.ppf(np.linspace(0, 1, 101)) * 3.0
    counts, _ = np.histogram(noise.numpy(), edges)
    _not_refuted(counts, np.ones(100))
    # Neighbours of a pair of Box and Muller, and its two halves, do not go together.
    flat = noise.flatten()
    half = len(flat) // 2
    for first, second in ((flat[:-1], flat[1:]), (flat[:half], flat[half:])):
        together = torch.corrcoef(torch.stack([first, second]).square())[0, 1]
        assert abs(float(together)) < 5 / math.sqrt(len(first))


@pytest.mark.parametrize("deviation", [0.5, 1.0, 4.25, 300.7])
def test_discrete_noise_has_the_discrete_distribution(deviation: float) -> None:
    drawn = SecureGenerator(1).discrete_gaussian((6000,), deviation).numpy()
    assert drawn.dtype == np.int64
    width = max(1, round(deviation / 4))  # numbers that share a bin
    reach = math.ceil(12 * deviation)
    numbers = np.arange(-reach, reach + 1)
    mass = np.exp(-(numbers**2) / (2 * deviation**2))
    bins = np.floor_divide(numbers, width)
    expected = np.bincount(bins - bins.min(), mass)
    observed = np.bincount(np.floor_divide(drawn, width) - bins.min(), minlength=len(expected))
    often = expected / expected.sum() * len(drawn) >= 8
    _not_refuted(
        np.append(observed[often], observed[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )


def test_coins_and_whole_numbers_are_fair() -> None:
    generator = SecureGenerator(2)
    heads = int(generator.bernoulli(0.3, 100_000).sum())
    _not_refuted(np.array([heads, 100_000 - heads]), np.array([0.3, 0.7]))
    counts = torch.bincount(generator.integers(7, 70_000), minlength=7)
    _not_refuted(counts.numpy(), np.ones(7))
    assert generator.bernoulli(1.0, 50).all()
    assert not generator.bernoulli(0.0, 50).any()
    assert generator.permutation(30).sort().values.tolist() == list(range(30))
    assert generator.integers(1, 5).tolist() == [0] * 5


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan, math.inf])
def test_impossible_deviations_are_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match="deviation"):
        SecureGenerator(0).discrete_gaussian((1,), deviation)


@pytest.mark.parametrize(("step", "error"), [(8, 1e-2), (64, 2e-4)])
@pytest.mark.parametrize(("deviation", "moved"), [(1.5, 2), (4.0, 40)])
def test_discrete_noise_on_a_fine_grid_keeps_the_promise_of_continuous_noise(
    deviation: float, moved: int, step: int, error: float
) -> None:
    """Delta of discrete noise, summed up, against the curve that the release accounts with.

    Neighbours move `moved` counts by one, which is `step` of the grid. The likelihood ratio of the
    noisy counts is a function of the sum of those noises: the convolution of `moved` discrete
    Gaussians. The error falls with the square of the step; releases have 2^20 to one.
    """
    deviation *= step
    reach = 1 << math.ceil(math.log2(16 * deviation * math.sqrt(moved)))
    numbers = np.arange(-reach, reach)
    single = np.exp(-(numbers**2) / (2 * deviation**2))
    single /= single.sum()
    spectrum = np.fft.fft(np.fft.ifftshift(single)).real  # symmetric
    summed = np.fft.fftshift(np.fft.ifft(spectrum**moved).real).clip(min=0)
    mu = math.sqrt(moved) * step / deviation
    loss = step * (moved * step - 2 * numbers) / (2 * deviation**2)  # log ratio, by the sum
    for epsilon in np.linspace(0.3, 4, 9) * mu:
        delta = float((summed * -np.expm1(np.minimum(epsilon - loss, 0))).sum())
        assert delta == pytest.approx(delta_of(float(epsilon), mu), rel=error, abs=1e-12)
