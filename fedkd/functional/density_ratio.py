"""How much likelier an image is under one set of images than under another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Images a kernel stands on: more cost memory by the square and hardly change the estimate.
CENTRES = 1000
# Reference and sample images looked at.
SAMPLES = 4000
# Directions of a gradient, cells along a side, images that are looked at together.
DIRECTIONS, CELLS, TOGETHER = 8, 7, 100

Features = Literal["pixels", "gradients"]
"""In what images are compared: as they are, or by the directions of their edges."""


def density_ratio(
    reference: Tensor,
    sample: Tensor,
    *,
    components: int = 50,
    bandwidth: float = 0.35,
    features: Features = "pixels",
) -> Tensor:
    """p_sample(x) / p_reference(x) at every reference image, by KuLSIF.

    Kernel unconstrained least-squares importance fitting (Kanamori, Suzuki, Sugiyama, "Statistical
    analysis of kernel-based least-squares density-ratio estimation", 2012; Theorem 1): one linear
    system, no iterations. Distances are taken between whitened principal components of the
    reference images, a space that everybody who has these images computes alike.

    Args:
        reference: (N, ...) images, any dtype; beyond 1,000 a fixed choice carries the kernels.
        sample: (P, ...) images of the same shape; at most 4,000 are used.
        components: Principal components kept.
        bandwidth: Of the Gaussian kernel, in medians of the reference images' distances.
        features: "pixels" compares what is at the same place; "gradients" (`oriented_gradients`,
            for pictures (N, channels, h, w)) bears small shifts and other strokes.

    Returns:
        (N,) float32, not negative, about 1 on average if the reference covers the sample; zeros
        for an empty sample.
    """
    if len(sample) == 0 or len(reference) == 0:
        return torch.zeros(len(reference))
    every = _vectors(reference, features)
    centres = _some(every, CENTRES)
    project = _whitening(centres, components)
    centres, near = project(centres), project(_vectors(_some(sample, SAMPLES), features))
    distances = torch.cdist(centres, centres)
    width = bandwidth * float(distances.median())
    if width == 0:  # all images alike: nothing tells the two sets apart
        return torch.ones(len(reference))

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return torch.exp(torch.cdist(first, second).square() / (-2 * width**2))

    count = len(centres)
    ridge = min(count, len(near)) ** -0.9  # the rate of the paper's Theorem 2
    within = torch.exp(distances.square() / (-2 * width**2)) / count
    within.diagonal().add_(ridge)
    weights = torch.linalg.solve(within, -kernel(centres, near).mean(dim=1) / (count * ridge))
    parts = []
    for rows in every.split(SAMPLES):
        here = project(rows)
        parts.append(kernel(here, centres) @ weights + kernel(here, near).mean(dim=1) / ridge)
    return torch.cat(parts).clamp(min=0).float()


def oriented_gradients(images: Tensor) -> Tensor:
    """How much edge of each direction is in each part of a picture, (N, channels, h, w) -> (N, D).

    Histograms over eight directions, light to dark told from dark to light, in cells that overlap
    by half; normalised over the picture, roots taken (Dalal and Triggs, "Histograms of Oriented
    Gradients for Human Detection", CVPR 2005, with Hellinger's normalisation over all cells).
    Colours are averaged.
    """
    if images.ndim != 4:
        raise ValueError(
            "images: gradients are those of pictures (N, channels, h, w), got "
            f"{tuple(images.shape)}"
        )
    return torch.cat([_histograms(part) for part in images.split(TOGETHER)])


def _histograms(images: Tensor) -> Tensor:
    grey = images.double().mean(dim=1, keepdim=True) / 255
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=grey.dtype) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None].to(grey)
    across, down = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).unbind(dim=1)
    length = (across.square() + down.square()).sqrt()
    turn = torch.atan2(down, across) / (2 * math.pi) * DIRECTIONS % DIRECTIONS
    lower = turn.floor()
    share, first = turn - lower, lower.long() % DIRECTIONS
    edges = torch.zeros(len(grey), DIRECTIONS, *grey.shape[2:]).to(grey)
    edges.scatter_add_(1, first[:, None], (length * (1 - share))[:, None])
    edges.scatter_add_(1, ((first + 1) % DIRECTIONS)[:, None], (length * share)[:, None])
    rows, columns = (max(1, round(side / CELLS)) for side in grey.shape[2:])
    edges = F.pad(edges, (columns // 2, columns // 2, rows // 2, rows // 2))
    window = min(2 * rows, edges.shape[2]), min(2 * columns, edges.shape[3])
    cells = F.avg_pool2d(edges, window, stride=(rows, columns)).flatten(1)
    return (cells / (cells.norm(dim=1, keepdim=True) + 1e-3)).sqrt()


def _vectors(images: Tensor, features: Features) -> Tensor:
    if features == "gradients":
        return oriented_gradients(images)
    return images.flatten(1).double() / 255


def _some(rows: Tensor, most: int) -> Tensor:
    """At most `most` rows, the same ones on every machine."""
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]


def _whitening(rows: Tensor, components: int) -> Callable[[Tensor], Tensor]:
    """Centre, rotate to principal components, divide by their deviations (and a little more).

    The floor of a tenth of the largest deviation keeps noise in the small components small.
    """
    mean = rows.mean(dim=0)
    _, values, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    deviations = values[:components] / len(rows) ** 0.5
    scale = (deviations + 0.1 * deviations[:1]).clamp(min=1e-12)
    return lambda points: (points - mean) @ (axes[:components].T / scale)
