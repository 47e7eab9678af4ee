"""What can be read off feature maps: class maps, statistics per cell, spectral norms.

Clients share these instead of the maps, which are a hundred times larger; losses compute the
student's side with the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.analytic_grad import first_order, through, transformed
from fedkd.functional.options import Count, options_checked
from fedkd.functional.precision import full, full_precision


@full_precision
def class_maps(maps: Tensor, weight: Tensor, size: int | None = None) -> Tensor:
    """FitContext for each class at each place, (B, D, h, w) x (C, D) -> (B, C, size, size).

    The classifier's weights are applied at every place; its bias is left out, so the mean over
    places is the logit less the bias. Pooling first is the same and cheaper, since both are
    linear. Half precision is computed in float32.

    Args:
        maps: The map that enters global pooling.
        weight: Weights of the linear classifier.
        size: Side of the grid to average to; None keeps (h, w).

    References:
        Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023,
            https://arxiv.org/abs/2304.12777
    """
    maps = full(maps)
    if size is not None:
        maps = averaged(maps, (size, size))
    return torch.einsum("bdhw,cd->bchw", maps, weight.to(maps.dtype))


def averaged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """What `adaptive_avg_pool2d` gives, (B, D, h, w) -> (B, D, *size), two to five times faster.

    Averaging is linear, and on a CPU a matrix product beats the pooling kernel by far, above all
    backward.
    """
    height, width = maps.shape[2:]
    if (height, width) == size:
        return maps
    even = height % size[0] == 0 and width % size[1] == 0
    if even and height * width > 64:  # one matrix for all places would be large
        rows = maps.unflatten(2, (size[0], -1)).sum(dim=3)
        columns = torch.eye(size[1], dtype=maps.dtype, device=maps.device)
        columns = columns.repeat_interleave(width // size[1], dim=1)
        return F.linear(rows, columns * (size[0] * size[1] / (height * width)))
    if height * width > 256:
        return F.adaptive_avg_pool2d(maps, size)
    places = torch.eye(height * width, dtype=maps.dtype, device=maps.device)
    cells = F.adaptive_avg_pool2d(places.view(-1, 1, height, width), size).flatten(1)
    return F.linear(maps.flatten(2), cells.T.contiguous()).unflatten(2, size)


@full_precision
def cell_statistics(maps: Tensor, grid: int = 1, *, eps: float = 1e-5) -> Tensor:
    """Mean and deviation per channel and cell, (B, D, h, w) -> (B, 2, D, grid, grid).

    Cells are bounded as in adaptive pooling, so they overlap where `grid` does not divide the side.
    The deviation is the root of the unbiased variance plus `eps`. A cell of a single pixel, where
    the published code gives NaN, has variance 0 and passes no gradient through its deviation.
    Half precision is computed in float32.

    Raises:
        ValueError: `grid` is not positive.

    References:
        Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
            Distillation", NeurIPS 2024, https://arxiv.org/abs/2412.08139
    """
    if grid < 1:
        raise ValueError(f"cell statistics: grid must be positive, got {grid}")
    maps = full(maps)
    if transformed(maps):
        return _by_cells(maps, grid, eps)
    statistics: Tensor = _CellStatistics.apply(maps, grid, eps)
    return statistics


def _by_cells(maps: Tensor, grid: int, eps: float) -> Tensor:
    """`cell_statistics` cell by cell."""
    height, width = maps.shape[2:]
    found = []
    for i in range(grid):
        rows = slice(i * height // grid, -(-(i + 1) * height // grid))
        for j in range(grid):
            cell = maps[:, :, rows, j * width // grid : -(-(j + 1) * width // grid)].flatten(2)
            mean = cell.mean(dim=2)
            squares = (cell - mean[:, :, None]).square().sum(dim=2)
            variance = squares / max(cell.shape[2] - 1, 1)
            found.append(torch.stack([mean, (variance + eps).sqrt()], dim=1))
    return torch.stack(found, dim=3).unflatten(3, (grid, grid))


def _cells(side: int, grid: int) -> list[slice]:
    return [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]


@lru_cache(maxsize=64)
def _membership(
    height: int, width: int, grid: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Who belongs to which cell, (grid^2, h w), and the same with overlapping cells side by side.

    Made on the host, so only once.
    """
    inside = alone = torch.ones(1, 1, dtype=dtype)
    for side in (height, width):
        places = torch.arange(side)
        cells = _cells(side, grid)
        here = torch.stack([(c.start <= places) & (places < c.stop) for c in cells]).to(dtype)
        inside = torch.kron(inside, here)
        if here.sum() > side:
            here = torch.block_diag(*[row[row > 0][None] for row in here])
        alone = torch.kron(alone, here)
    return inside.to(device), alone.to(device)


class _CellStatistics(torch.autograd.Function):
    """All cells at once, by products with the (grid^2, h w) matrix of who belongs where.

    The variance is taken around each cell's own mean: the difference of two moments would lose
    all digits where the mean is large. Backward is one pass over the map.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, grid: int, eps: float) -> Tensor:
        flat, spread = maps.flatten(2), maps
        height, width = maps.shape[2:]
        for axis, side in ((2, height), (3, width)):
            cells = _cells(side, grid)
            if sum(c.stop - c.start for c in cells) > side:  # overlapping ones, side by side
                spread = torch.cat([spread[(slice(None),) * axis + (c,)] for c in cells], axis)
        inside, alone = _membership(height, width, grid, maps.dtype, maps.device)
        size = inside.sum(dim=1)
        mean = flat @ (inside / size[:, None]).T
        deviation = torch.addmm(
            spread.reshape(-1, alone.shape[1]), mean.flatten(0, 1), alone, alpha=-1
        )
        variance = deviation.square_() @ (alone / (size - 1).clamp(min=1)[:, None]).T
        variance = variance.view_as(mean)
        std = (variance + eps).sqrt_()
        ctx.save_for_backward(maps, mean, std, inside, size)
        ctx.options = grid, eps
        return torch.stack([mean, std], dim=1).unflatten(3, (grid, grid))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, mean, std, inside, size = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *through(lambda z: _by_cells(z, *ctx.options), (maps,), grad), None, None
        for_mean, for_std = grad.flatten(3).unbind(dim=1)
        slope = torch.where(size > 1, for_std / (std * (size - 1)), 0)
        level = for_mean / size - slope * mean
        gradient = (slope.flatten(0, 1) @ inside).mul_(maps.reshape(-1, inside.shape[1]))
        gradient.addmm_(level.flatten(0, 1), inside)
        return gradient.view(maps.shape), None, None


@full_precision
def spatial_moments(maps: Tensor) -> Tensor:
    """Mean and covariance of the channels over places, (B, D, h, w) -> (B, D + 1, D).

    Row 0 is the mean; the covariance is the biased one. Half precision is computed in float32.
    """
    maps = full(maps).flatten(2)
    mean = maps.mean(dim=2, keepdim=True)
    centred = maps - mean
    covariance = centred @ centred.transpose(1, 2) / maps.shape[2]
    return torch.cat([mean.transpose(1, 2), covariance], dim=1)


@full_precision
@options_checked("spectral norms")
def spectral_norms(
    stages: Sequence[Tensor],
    *,
    iterations: Count = 20,
    start: Literal["ones", "uniform"] | Sequence[Tensor] = "ones",
    gradient: Literal["exact", "unrolled"] = "exact",
) -> Tensor:
    """Largest singular value of each transmitting matrix, (B, len(stages) - 1).

    The transmitting matrix of neighbouring stages F (C, h, w) and G (C', h', w') is
    F G^T / (h' w'), (C, C'), with F averaged to the size of G. Its norm says how much the block
    between them stretches its input. Half precision is computed in float32; a map of zeros gives 0
    and no gradient, where the published code gives NaN.

    Args:
        stages: Maps from shallow to deep, (B, C_i, h_i, w_i), none larger than the one before.
        iterations: Steps of the power iteration. On random maps 5 leave an error of 6 %, 10 of
            2 %, as published; 20 make a value worth caching.
        start: First vector of the iteration: ones; `uniform` draws it in [0, 1) anew, as published
            on CIFAR, which makes the same map give different values; or one tensor per pair, (C_i,)
            or (B, C_i).
        gradient: "exact" iterates without gradient and differentiates ||F' u|| at the vector u
            it found, the gradient of the singular value itself, at about half the time;
            "unrolled" takes value and gradient through all steps, as published.

    Raises:
        ValueError: there are fewer than two stages, or a map is larger than the one before.

    References:
        Shang et al., "Lipschitz Continuity Guided Knowledge Distillation", ICCV 2021,
            https://arxiv.org/abs/2108.12905
    """
    if len(stages) < 2:
        raise ValueError(f"spectral norms need at least 2 stages, got {len(stages)}")
    norms = []
    for pair, (shallow, deep) in enumerate(pairwise(full(stage) for stage in stages)):
        size = (deep.shape[2], deep.shape[3])
        if len(shallow) != len(deep):
            raise ValueError(
                f"spectral norms: stage {pair} has {len(shallow)} samples, the next one {len(deep)}"
            )
        if shallow.shape[2] < size[0] or shallow.shape[3] < size[1]:
            raise ValueError(
                f"spectral norms: stage {pair} is {tuple(shallow.shape[2:])}, "
                f"smaller than the next one, {size}"
            )
        first = shallow.new_ones(len(shallow), shallow.shape[1], 1)
        if not isinstance(start, str):
            first = start[pair].to(first).reshape(-1, first.shape[1], 1).expand_as(first)
        elif start == "uniform":
            first = torch.rand_like(first)
        if gradient == "exact":
            exact = partial(_exact, first=first, iterations=iterations)
            again = partial(_unrolled, first=first, iterations=iterations, settle=True)
            norm = first_order(exact, again, shallow, deep)
        else:
            norm = _unrolled(shallow, deep, first=first, iterations=iterations)
        norms.append(norm / (size[0] * size[1]))
    return torch.stack(norms, dim=1)


def _exact(shallow: Tensor, deep: Tensor, *, first: Tensor, iterations: int) -> Tensor:
    """||F' u|| for a vector u found without gradient, (B,)."""
    size = (deep.shape[2], deep.shape[3])
    with torch.no_grad():
        matrix = averaged(shallow, size).flatten(2) @ deep.flatten(2).transpose(1, 2)
        vector, _ = _power_iteration(matrix, first, iterations)
    # To mix channels and to average places commute, so one channel is averaged, not C.
    mixed = vector.transpose(1, 2) @ shallow.flatten(2)
    mixed = averaged(mixed.unflatten(2, shallow.shape[2:]), size).flatten(2)
    return torch.linalg.vector_norm(deep.flatten(2) @ mixed.transpose(1, 2), dim=(1, 2))


def _unrolled(
    shallow: Tensor, deep: Tensor, *, first: Tensor, iterations: int, settle: bool = False
) -> Tensor:
    """The same through all steps, (B,); `settle` first finds where they end without gradient."""
    matrix = averaged(shallow, (deep.shape[2], deep.shape[3])).flatten(2)
    matrix = matrix @ deep.flatten(2).transpose(1, 2)
    if settle:
        first = _power_iteration(matrix.detach(), first, iterations)[0]
    return _power_iteration(matrix, first, iterations)[1]


def _power_iteration(matrix: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Left singular vector (B, C, 1) and its singular value (B,) after some steps on M M^T."""
    gram = matrix @ matrix.transpose(1, 2)
    # Powers of features soon leave float32. The eigenvalue is proportional to the matrix, so any
    # constant may be divided out and multiplied back; the largest entry is on the diagonal.
    scale = gram.detach().diagonal(dim1=1, dim2=2).amax(dim=1).clamp(min=1e-30)
    gram = gram / scale[:, None, None]
    length = gram.new_ones(len(gram), 1, 1)
    for _ in range(steps):
        moved = (gram * vector.transpose(1, 2)).sum(dim=2, keepdim=True)
        length = torch.linalg.vector_norm(moved, dim=1, keepdim=True).clamp(min=1e-12)
        vector = moved / length
    return vector, scale.sqrt() * length.flatten().sqrt()
