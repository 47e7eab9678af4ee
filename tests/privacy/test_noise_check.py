"""Noise that is not as large as promised is refused before an image is read."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedkd.privacy.clipping import Clipping
from fedkd.privacy.dp_sgd import Mechanism
from fedkd.privacy.noise_check import (
    SIDE,
    check_noise,
    chi_square,
    direction,
    noise_of,
    pictures,
    trained,
)
from fedkd.rounds import ExperimentContext
from tests.conftest import Tiny
from tests.studies.audit.breaks import broken

MECHANISM = Mechanism.of(160, 80, 60, 12.0, max_grad_norm=0.5)


def test_the_approximation_is_that_of_the_chi_square_distribution() -> None:
    for freedom in (128, 2048, 128_000):
        for z in (-5.5, -3.0, 0.5, 4.0, 6.0):
            squares = freedom + z * math.sqrt(2 * freedom)
            exact = 2 * min(chi2.sf(squares, freedom), chi2.cdf(squares, freedom))
            assert chi_square(squares, freedom) == pytest.approx(exact, rel=0.25)


def test_ratio_and_shared_noise_by_hand() -> None:
    draws = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 2000)))
    right = noise_of(3 * draws, 3.0)
    assert right.numbers == 8000
    assert right.p > 1e-3
    assert right.ratio == pytest.approx(1, abs=0.03)
    alike = noise_of(draws[:1].expand(4, -1), 1.0)
    assert alike.shared == pytest.approx(2, abs=0.1)  # the root of four trainings
    assert alike.p < 1e-9


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
@pytest.mark.parametrize("together", [False, True])
def test_one_white_picture_moves_a_step_by_the_clipping_norm(
    clipping: Clipping, together: bool
) -> None:
    quiet = replace(MECHANISM, sample_rate=1.0, steps=3, noise_multiplier=0.0, clipping=clipping)
    moved = trained(quiet, pictures(2, 1, 8), 2, together=together, rounds=2)
    assert moved @ direction(8) == pytest.approx([6.0, 6.0], rel=1e-4)
    assert moved.norm(dim=1) == pytest.approx([6.0, 6.0], rel=1e-4)
    assert float(trained(quiet, pictures(3, 0, 8), 1, together=together).abs().max()) == 0


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_right_noise_passes_whatever_the_numbers(clipping: Clipping) -> None:
    for noise in (0.3, 12.0, 400.0):
        check_noise(replace(MECHANISM, noise_multiplier=noise, clipping=clipping))
    check_noise(replace(MECHANISM, noise_multiplier=0.0))
    check_noise(Mechanism.of(10, 10, 1, 1.0, max_grad_norm=1e3))


def test_an_empty_draw_is_all_that_is_needed() -> None:
    moved = trained(replace(MECHANISM, steps=2), pictures(0, 0, SIDE), 2, together=False)
    assert moved.shape == (2, 2 * SIDE * SIDE)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("noise / 4", "0.2[45]"),
        ("noise every second step", "0.[67]"),
        ("noise of a known key", ".* and two trainings draw the same noise"),
    ],
)
def test_a_private_run_does_not_begin_with_other_noise(tiny: Tiny, name: str, seen: str) -> None:
    experiment = tiny(
        "teachers.models=[mlp]", "fusion=[entropy]", "evaluation.clients=false",
        "evaluation.baselines=[]",
        "teachers.privacy={epsilon: 4, delta: 0.001, nominal_size: 40, max_grad_norm: 0.5}",
    )  # fmt: skip
    with broken(name), pytest.raises(RuntimeError, match="not the promised one") as error:
        ExperimentContext(experiment)
    text = str(error.value)
    assert "x max_grad_norm 0.5 / expected batch 16" in text
    assert re.search(f"standard deviation is {seen}", text)


def test_both_paths_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedkd.privacy.dp_sgd._noise", lambda _own, stack, _deviation: torch.zeros(2048)
    )
    with pytest.raises(RuntimeError, match="of clients together without images"):
        check_noise(MECHANISM)
