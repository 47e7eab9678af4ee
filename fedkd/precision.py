"""In which precision formulas are computed: at least float32, whatever autocast says.

Squares, exponentials and eigenvalues of half-precision numbers are soon infinite, and Gram matrices
of them worthless. Layers may run under autocast, formulas do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def full(values: Tensor) -> Tensor:
    """Half precision as float32; the rest as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, for which autocast is switched off."""

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        device = _device((*args, *kwargs.values()))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return outside


def _device(values: tuple[object, ...]) -> str:
    """Type of the device of the first tensor."""
    for value in values:
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"
