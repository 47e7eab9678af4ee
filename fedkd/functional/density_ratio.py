"""How much likelier an image is under one set of images than under another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Images a kernel stands on: more cost memory by the square and hardly change the estimate.
CENTRES = 1000
# Reference and sample images looked at.
SAMPLES = 4000


def density_ratio(
    reference: Tensor, sample: Tensor, *, components: int = 50, bandwidth: float = 0.35
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

    Returns:
        (N,) float32, not negative, about 1 on average if the reference covers the sample; zeros
        for an empty sample.
    """
    if len(sample) == 0 or len(reference) == 0:
        return torch.zeros(len(reference))
    every = reference.flatten(1).double() / 255
    centres = _some(every, CENTRES)
    project = _whitening(centres, components)
    centres, near = project(centres), project(_some(sample.flatten(1).double() / 255, SAMPLES))
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
