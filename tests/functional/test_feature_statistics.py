"""Statistics per cell and moments over places, against plain formulas."""

import numpy as np
import pytest
import torch

from fedkd.functional.feature_statistics import cell_statistics, spatial_moments
from tests.losses.contract import draw


def _literal(maps, grid):
    """As published, cell by cell."""
    height, width = maps.shape[2:]
    out = maps.new_zeros(len(maps), 2, maps.shape[1], grid, grid)
    for i in range(grid):
        rows = slice(int(np.floor(i * height / grid)), int(np.ceil((i + 1) * height / grid)))
        for j in range(grid):
            columns = slice(int(np.floor(j * width / grid)), int(np.ceil((j + 1) * width / grid)))
            cell = maps[:, :, rows, columns]
            out[:, 0, :, i, j] = cell.mean(dim=(2, 3))
            out[:, 1, :, i, j] = (cell.var(dim=(2, 3)) + 1e-5).sqrt()
    return out


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(8, 8, 1), (8, 8, 2), (8, 8, 4), (7, 7, 2), (7, 7, 4), (7, 5, 3), (4, 6, 2), (14, 9, 4)],
)
def test_cells_repeat_the_literal_form(height, width, grid):
    maps = draw(2, 3, height, width).requires_grad_()
    weights = draw(2, 2, 3, grid, grid, seed=1)
    literal, found = _literal(maps, grid), cell_statistics(maps, grid)
    torch.testing.assert_close(found, literal, rtol=1e-12, atol=1e-12)
    expected, gradient = (
        torch.autograd.grad((weights * value).sum(), maps)[0] for value in (literal, found)
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_cells_gradcheck(grid):
    maps = draw(1, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cell_statistics(x, grid, eps=1e-3), (maps,))


@pytest.mark.parametrize("grid", [1, 3])
def test_a_large_mean_costs_no_digits(grid):
    maps = draw(2, 3, 7, 7).float()
    found = cell_statistics(maps + 1000, grid)[:, 1]
    torch.testing.assert_close(found, cell_statistics(maps, grid)[:, 1], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("side", "grid"), [(4, 4), (1, 1), (2, 4)])
def test_cells_of_one_pixel_have_no_spread(side, grid):
    maps = (1000 * draw(2, 3, side, side)).float().requires_grad_()
    statistics = cell_statistics(maps, grid)
    statistics[:, 1].sum().backward()
    assert (statistics[:, 1] == 1e-5**0.5).all()
    assert (maps.grad == 0).all()


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_constant_maps_are_finite(value):
    maps = torch.full((2, 3, 7, 7), value, requires_grad=True)
    statistics = cell_statistics(maps, 2)
    statistics.sum().backward()
    torch.testing.assert_close(statistics[:, 0], torch.full((2, 3, 2, 2), value))
    torch.testing.assert_close(
        statistics[:, 1], torch.full((2, 3, 2, 2), 1e-5**0.5), rtol=1, atol=0
    )
    assert maps.grad.isfinite().all()


def test_half_precision_is_computed_in_full():
    maps = (100 * draw(2, 3, 4, 4)).half().requires_grad_()
    statistics = cell_statistics(maps, 2)
    statistics.sum().backward()
    torch.testing.assert_close(statistics, cell_statistics(maps.detach().float(), 2))
    assert maps.grad.dtype == torch.float16
    assert spatial_moments(maps).dtype == torch.float32


def test_no_cells_are_refused():
    with pytest.raises(ValueError, match="grid must be positive, got 0"):
        cell_statistics(draw(1, 1, 2, 2), 0)


def test_moments_are_numpys():
    maps = draw(2, 3, 4, 5)
    moments = spatial_moments(maps)
    for sample, found in zip(maps.flatten(2).numpy(), moments.numpy()):
        np.testing.assert_allclose(found[0], sample.mean(axis=1))
        np.testing.assert_allclose(found[1:], np.cov(sample, bias=True))
