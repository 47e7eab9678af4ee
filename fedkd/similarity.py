"""How alike two representations are (CKA), and what that says of classes."""

from __future__ import annotations

from torch import Tensor


def angle_costs(weight: Tensor) -> Tensor:
    """1 - cos between the classes' weight vectors, (C, D) -> (C, C)."""
    raise NotImplementedError


def alignment_costs(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """1 - linear CKA between the classes' observations, (N, places, D) x (N,) -> (C, C)."""
    raise NotImplementedError
