"""Labels that may be lies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkd.privacy.noise import SecureGenerator


def keep_probability(epsilon: float, classes: int) -> float:
    """Probability with which randomised response tells the truth."""
    return 1 / (1 + (classes - 1) * math.exp(-epsilon))


def randomised(
    labels: Tensor, classes: int, epsilon: float, *, generator: SecureGenerator | None = None
) -> Tensor:
    """Each label kept with probability e^eps / (e^eps + C - 1), else another one, all alike.

    Protects labels, not images: (epsilon, 0)-differential privacy of each label, once, whatever is
    done with the result. Randomness comes from the operating system.

    Args:
        labels: (N,), int64.
        classes: C, at least 2.
        epsilon: Positive and finite.
        generator: A seeded one for tests; who knows the seed knows the labels.

    Raises:
        ValueError: epsilon or the number of classes is impossible.

    References:
        Ghazi et al., "Deep Learning with Label Differential Privacy", NeurIPS 2021,
            https://arxiv.org/abs/2102.06062, Algorithm 1
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon: expected more than 0 and finite, got {epsilon}")
    if classes < 2:
        raise ValueError(f"randomised response needs two classes, got {classes}")
    draw = SecureGenerator() if generator is None else generator
    kept = draw.bernoulli(keep_probability(epsilon, classes), len(labels))
    shift = 1 + draw.integers(classes - 1, len(labels))
    return torch.where(kept, labels, (labels + shift) % classes)
