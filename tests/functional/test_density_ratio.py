"""KuLSIF finds the ratio it should, and nothing where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedkd.functional.density_ratio import CENTRES, density_ratio, oriented_gradients


def _gaussian(count: int, mean: float, seed: int, dims: int = 1) -> Tensor:
    draw = torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))
    return 255 * (draw + mean)  # images are divided by 255


def test_the_ratio_of_two_gaussians_is_their_exponential() -> None:
    """N(1, 1) against N(0, 1): the ratio is exp(x - 1/2)."""
    reference, sample = _gaussian(1000, 0.0, 1), _gaussian(1000, 1.0, 2)
    x = reference[:, 0] / 255
    inside = x.abs() < 1.5
    found, true = density_ratio(reference, sample)[inside], torch.exp(x - 0.5)[inside]
    assert float((found - true).abs().mean()) < 0.15
    assert float(torch.corrcoef(torch.stack([found, true]))[0, 1]) > 0.97


def test_a_sample_like_the_reference_gives_ones() -> None:
    found = density_ratio(_gaussian(800, 0.0, 1, 3), _gaussian(800, 0.0, 2, 3))
    assert float(found.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(found.std()) < 0.5


def test_images_of_another_cluster_are_not_familiar() -> None:
    reference = torch.cat([_gaussian(200, -3.0, 1, 4), _gaussian(200, 3.0, 2, 4)])
    found = density_ratio(reference, _gaussian(100, 3.0, 3, 4))
    assert float(found[:200].mean()) < 0.05
    assert float(found[200:].mean()) == pytest.approx(2.0, rel=0.2)


def test_beyond_the_centres_every_image_still_gets_its_number() -> None:
    reference = _gaussian(CENTRES + 500, 0.0, 1)
    found = density_ratio(reference, _gaussian(500, 1.0, 2))
    x = reference[:, 0] / 255
    late = (x.abs() < 1.5) & (torch.arange(len(x)) >= CENTRES)
    true = torch.exp(x - 0.5)
    assert float((found[late] - true[late]).abs().mean()) < 0.2


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_samples_give_finite_numbers(count: int) -> None:
    found = density_ratio(_gaussian(50, 0.0, 1, 5), _gaussian(count, 0.0, 2, 5))
    assert found.shape == (50,)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    assert bool((found == 0).all()) == (count == 0)


def test_images_all_alike_tell_nothing_apart() -> None:
    assert density_ratio(torch.zeros(4, 3, 2, 2), torch.ones(3, 3, 2, 2)).tolist() == [1.0] * 4


def test_bytes_and_floats_of_the_same_images_agree() -> None:
    images = torch.randint(256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    bytes_, floats = images.to(torch.uint8), images.float()
    assert torch.equal(density_ratio(bytes_, bytes_[:9]), density_ratio(floats, floats[:9]))
    assert not math.isclose(float(density_ratio(floats, floats[:9]).std()), 0.0)


def _bars(count: int, *, upright: bool, seed: int) -> Tensor:
    """Pictures of one bar, somewhere."""
    images = torch.zeros(count, 1, 12, 12)
    places = torch.randint(1, 10, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    for image, place in zip(images, places, strict=True):
        image[0, :, place : place + 2] = 255
    return images if upright else images.transpose(2, 3)


def test_gradients_tell_a_bar_that_stands_from_one_that_lies() -> None:
    standing, lying = (_bars(8, upright=up, seed=1) for up in (True, False))
    across = oriented_gradients(standing).reshape(8, 8, -1).mean(dim=(0, 2))
    assert set(across.topk(2).indices.tolist()) == {0, 4}  # dark to light, light to dark
    down = oriented_gradients(lying).reshape(8, 8, -1).mean(dim=(0, 2))
    assert set(down.topk(2).indices.tolist()) == {2, 6}
    assert oriented_gradients(torch.full((2, 3, 5, 9), 7.0)).eq(0).all()


def test_gradients_find_the_pictures_that_are_like_ones_own() -> None:
    reference = torch.cat([_bars(60, upright=up, seed=2) for up in (True, False)])
    own = _bars(40, upright=True, seed=3)
    found = density_ratio(reference, own, features="gradients")
    assert float(found[:60].mean()) > 1
    assert float(found[60:].mean()) < 0.1
    colours = density_ratio(
        reference.expand(-1, 3, -1, -1), own.expand(-1, 3, -1, -1), features="gradients"
    )
    assert colours.allclose(found, atol=1e-4)
    with pytest.raises(ValueError, match=r"images: gradients are those of pictures \(N, channels"):
        density_ratio(torch.zeros(3, 4), torch.zeros(3, 4), features="gradients")
