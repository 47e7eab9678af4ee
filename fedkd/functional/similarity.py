"""How alike two representations of the same samples are (CKA), and what that says of classes.

Weights on the samples act as a measure: a sample without weight might as well be missing.
Representations that do not vary have nothing in common with any other; their similarity is 0,
without gradient, where the published formulas divide 0 by 0. Half precision is computed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.precision import full, full_precision


@full_precision
def linear_cka(
    x: Tensor, y: Tensor, *, weights: Tensor | None = None, centred: bool = True
) -> Tensor:
    """Linear CKA of n samples in rows, (n, d) x (n, e) -> scalar in [0, 1].

    Rotating or scaling either side changes nothing. This is the biased estimate: far from 0 for
    independent representations unless n is much larger than d.

    Args:
        x: One representation.
        y: The other.
        weights: Weight of each sample, (n,); equal if None.
        centred: Off gives the kernel alignment that Cortes et al. corrected.

    References:
        Cortes et al., "Algorithms for Learning Kernels Based on Centered Alignment", JMLR 2012,
            https://arxiv.org/abs/1203.0550
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
            https://arxiv.org/abs/1905.00414
    """
    shares = _shares(weights, x)
    x, y = (_scaled(z, shares, centred) * shares.sqrt()[:, None] for z in (x, y))
    (n, d), e = x.shape, y.shape[1]
    if n * (d + e) < d * d + d * e + e * e:
        a, b = x @ x.T, y @ y.T
        return _ratio((a * b).sum(), a.square().sum(), b.square().sum())
    products = (x.T @ y, x.T @ x, y.T @ y)
    return _ratio(*(product.square().sum() for product in products))


@full_precision
def rbf_cka(x: Tensor, y: Tensor, *, sigma: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """CKA with Gaussian kernels, (n, d) x (n, e) -> scalar in [0, 1].

    The kernel is exp(-d^2 / (2 sigma^2 m)) with m the lower median of all n^2 squared distances,
    the n zeros among them included, as published.

    Args:
        x: One representation.
        y: The other.
        sigma: Width of the kernel in roots of that median.
        weights: Weight of each sample, (n,); equal if None.

    References:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
            https://arxiv.org/abs/1905.00414
    """
    shares = _shares(weights, x)
    a, b = (_gaussian(_scaled(z, shares), shares, sigma) for z in (x, y))
    pairs = shares[:, None] * shares
    return _ratio(*((pairs * product).sum() for product in (a * b, a * a, b * b)))


@full_precision
def unbiased_cka(x: Tensor, y: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Linear CKA from unbiased estimates, (n, d) x (n, e) -> scalar, about 0 if independent.

    May be negative. Fewer than four samples with weight cannot be judged and give 0.

    Args:
        x: One representation.
        y: The other.
        weights: Weight of each sample, (n,); equal if None.

    References:
        Song et al., "Feature Selection via Dependence Maximization", JMLR 2012,
            https://jmlr.org/papers/v13/song12a.html
        Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021,
            https://arxiv.org/abs/2010.15327
    """
    shares = _shares(weights, x)
    a, b = (_hollow(_scaled(z, shares)) for z in (x, y))
    estimates = (_hsic(k, m, shares.double()) for k, m in ((a, b), (a, a), (b, b)))
    return _ratio(*estimates).to(shares.dtype)


@full_precision
def angle_costs(weight: Tensor) -> Tensor:
    """1 - cos between the classes' weight vectors, (C, D) -> (C, C): 0 on the diagonal, up to 2."""
    unit = F.normalize(full(weight.detach()), dim=1)
    return (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)


@full_precision
def alignment_costs(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """1 - linear CKA between the classes' observations, (N, places, D) x (N,) -> (C, C).

    Every place of a sample is one observation. Classes have no samples in common, so CKA pairs
    their observations by order alone, as published: another order of the samples gives other
    costs. All classes are cut to the samples of the smallest that has any. A class without samples
    costs 1 to reach; to stay costs 0.

    Next to the features, memory holds what the larger of 256 MB and one class takes, twice.

    Args:
        features: Observations; a single place for vectors.
        labels: Class of each sample.
        classes: C.

    References:
        Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
            Distillation", NeurIPS 2024, https://arxiv.org/abs/2412.08139
    """
    places, width = features.shape[1:]
    counts = torch.bincount(labels, minlength=classes)
    present = counts.nonzero().flatten()
    costs = torch.ones(classes, classes, dtype=full(features[:0]).dtype, device=features.device)
    if len(present):
        first = counts.cumsum(0) - counts
        chosen = first[present, None] + torch.arange(
            int(counts[present].min()), device=labels.device
        )
        samples = labels.argsort(stable=True)[chosen].to(features.device)
        rows = samples[:, :, None] * places + torch.arange(places, device=features.device)
        classwise = _Classwise(features.flatten(0, 1), rows.flatten(1))
        # Both give |X^T Y|^2 = <X X^T, Y Y^T>; what is cheaper depends on the shapes.
        by_samples = rows[0].numel() * (len(present) + width) < len(present) * width**2
        squares = classwise.by_samples() if by_samples else classwise.by_features()
        norms = squares.diagonal().sqrt()
        scale = norms[:, None] * norms
        alike = torch.where(scale <= 0, 0, squares / scale.clamp(min=1e-300))
        costs[present[:, None], present] = (1 - alike).clamp(0, 1).to(costs)
    return costs.fill_diagonal_(0)


@full_precision
def sharpened(costs: Tensor, kappa: float = 1.0) -> Tensor:
    """1 - exp(-kappa D) of raw costs D, 1e-8 more so that none is 0; kappa 0 leaves D."""
    if kappa:
        costs = -torch.expm1(-kappa * costs)
    return costs.clamp(min=0) + 1e-8


class _Classwise:
    """Centred observations of each class, unit in norm, fetched when asked.

    Args:
        flat: All observations, (N places, D).
        rows: Which of them are each class's, (C, R).
    """

    budget = 2**26  # numbers held at once

    def __init__(self, flat: Tensor, rows: Tensor) -> None:
        self.flat, self.rows = flat, rows
        means, scales = [], []
        for own in rows:
            observed = full(flat[own])
            means.append(observed.mean(dim=0))
            spread = torch.linalg.norm(observed - means[-1])
            scales.append(_inverse(spread, torch.linalg.norm(observed)))
        self.means, self.scales = torch.stack(means), torch.stack(scales)

    def take(self, classes: slice, rows: slice) -> Tensor:
        observed = full(self.flat[self.rows[classes, rows]])
        return (observed - self.means[classes, None]) * self.scales[classes, None, None]

    def by_features(self) -> Tensor:
        """|X_i^T X_j|^2 from D x D products, (C, C)."""
        (classes, rows), width = self.rows.shape, self.flat.shape[1]
        squares = torch.zeros(classes, classes, dtype=torch.float64, device=self.flat.device)
        every, step = slice(None), max(1, self.budget // (rows * width))
        for start in range(0, classes, step):
            block = slice(start, start + step)
            held = self.take(block, every)
            for other in range(start, classes):
                (alone,) = self.take(slice(other, other + 1), every)
                products = alone.T @ held
                squares[block, other] = products.double().square().sum(dim=(1, 2))
        return squares.triu() + squares.triu(1).T

    def by_samples(self) -> Tensor:
        """The same from blocks of the R x R products, (C, C)."""
        (classes, rows), width = self.rows.shape, self.flat.shape[1]
        squares = torch.zeros(classes, classes, dtype=torch.float64, device=self.flat.device)
        every, limit = slice(None), self.budget // classes
        step = max(1, min(math.isqrt(limit), max(64, limit // width)))
        for start in range(0, rows, step):
            held = self.take(every, slice(start, start + step))
            for other in range(start, rows, step):
                alone = self.take(every, slice(other, other + step))
                grams = (held @ alone.transpose(1, 2)).flatten(1)
                squares += (grams @ grams.T) * (1 if other == start else 2)
        return squares


def _gaussian(z: Tensor, shares: Tensor, sigma: float) -> Tensor:
    """Gaussian kernel, centred, (n, d) -> (n, n)."""
    gram = z @ z.T
    squares = gram.diagonal()
    distances = (squares[:, None] + squares - 2 * gram).clamp(min=0)
    distances = distances - torch.diag(distances.diagonal())
    counted = shares > 0
    if z.device.type != "cpu":
        median = _median(distances, counted)
    elif counted.any():
        median = distances[counted][:, counted].median()
    else:
        return gram
    # Less 1, which centring takes away again; a kernel of ones must not leave rounding errors.
    kernel = torch.expm1(distances / (-2 * sigma**2 * torch.where(median > 0, median, 1)))
    means = kernel @ shares
    return kernel - means[:, None] - means + means @ shares


def _median(distances: Tensor, counted: Tensor) -> Tensor:
    """Lower median between those that count, (n, n) x (n,) -> scalar, without asking how many."""
    pairs = counted[:, None] & counted
    ordered = torch.where(pairs, distances, torch.inf).flatten().sort().values
    place = (pairs.sum() - 1).clamp(min=0) // 2
    return ordered.gather(0, place[None]).squeeze(0)


def _hollow(z: Tensor) -> Tensor:
    """Linear kernel without its diagonal, in double precision, (n, d) -> (n, n)."""
    gram = (z @ z.T).double()
    return gram - torch.diag(gram.diagonal())


def _hsic(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Unbiased HSIC of two hollow kernels (n, n) under weights (n,) that sum to 1.

    Means over two, three and four different samples; with equal weights it is Song's HSIC_1.
    """
    ab = a * b
    by_a, by_b = a @ w, b @ w
    two = w @ ab @ w
    three = w @ (by_a * by_b - ab @ w**2)
    four = (w @ by_a) * (w @ by_b) - 4 * (w**2 @ (by_a * by_b)) + 2 * (w**2 @ ab @ w**2)
    second, third, fourth = ((w**power).sum() for power in (2, 3, 4))
    pairs, triples = 1 - second, 1 - 3 * second + 2 * third
    quadruples = 1 - 6 * second + 3 * second**2 + 8 * third - 6 * fourth
    enough = quadruples > 1e-9
    pairs, triples, quadruples = (torch.where(enough, x, 1) for x in (pairs, triples, quadruples))
    return torch.where(enough, two / pairs + four / quadruples - 2 * three / triples, 0)


def _ratio(across: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """across / sqrt(ours * theirs); 0 without gradient if either is not positive."""
    none = (ours <= 0) | (theirs <= 0)  # false of NaN, which must not look like no likeness
    scale = torch.where(none, 1, ours).sqrt() * torch.where(none, 1, theirs).sqrt()
    return torch.where(none, 0, across / scale)


def _shares(weights: Tensor | None, x: Tensor) -> Tensor:
    """Weights that sum to one, or are all zero, (n,)."""
    if weights is None:
        return full(x.detach()).new_full((len(x),), 1 / len(x))
    weights = weights.to(full(x[:0]).dtype)
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _scaled(z: Tensor, shares: Tensor, centred: bool = True) -> Tensor:
    """Centred and of unit size under the weights; zeros if nothing but rounding varies."""
    z = full(z)
    length = (shares @ z.detach().square().sum(dim=1)).sqrt()
    if centred:
        z = z - shares @ z
    # Similarities do not see the scale, so their gradient need not pass through it.
    return z * _inverse((shares @ z.detach().square().sum(dim=1)).sqrt(), length)


def _inverse(spread: Tensor, length: Tensor) -> Tensor:
    """1 / spread, or 0 if that is no more than rounding errors of values of this length."""
    none = spread <= 8 * torch.finfo(spread.dtype).eps * length
    return torch.where(none, 0, 1 / torch.where(none, 1, spread))
