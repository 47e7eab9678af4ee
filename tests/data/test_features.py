"""Principal directions of public images."""

import pytest
import torch

from fedkd.data.features import basis_of


def _images(count: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 1, 4, 4), generator=generator).to(torch.uint8)


def test_features_are_whitened_principal_components_of_length_one() -> None:
    images = _images()
    basis = basis_of(images, 5)
    pixels = images.flatten(1).double() / 255
    centred = pixels - pixels.mean(0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    variances = (values**2 / len(images))[:5]
    expected = centred @ rows[:5].T / (variances + 0.1 * variances[0]).sqrt()
    expected = expected / expected.norm(dim=1, keepdim=True)
    got = basis(images).double()
    assert torch.allclose(got.abs(), expected.abs(), atol=1e-5)
    assert torch.allclose(got.norm(dim=1), torch.ones(30).double(), atol=1e-6)


@pytest.mark.parametrize("count", [8, 30])  # fewer images than pixels, and more
def test_a_direction_has_one_sign(count: int) -> None:
    axes = basis_of(_images(count), 5).axes
    largest = axes.gather(0, axes.abs().argmax(dim=0)[None])
    assert (largest > 0).all()


def test_more_directions_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="4 public images of 16 numbers have at most 3, got 4"):
        basis_of(_images(4), 4)


def test_a_basis_is_kept_and_follows_the_images() -> None:
    images = _images()
    assert basis_of(images, 3) is basis_of(images.clone(), 3)
    assert basis_of(images, 3) is not basis_of(images.flip(0)[1:], 3)
