"""In which precision formulas are computed: at least float32, whatever autocast says.

Squares, exponentials and eigenvalues of half-precision numbers are soon infinite, and Gram matrices
of them worthless. Layers may run under autocast, formulas do not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def full(values: Tensor) -> Tensor:
    """Half precision as float32; the rest as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def abreast(rows: Tensor) -> bool:
    """Whether a CPU finds the same digits for these rows (B, C) beside others as alone.

    It takes several numbers at once, and the last few of a tensor one by one, by another
    exponential. So there must be none left over, nor of what has one or two numbers a row.
    """
    size = rows.shape[0] if rows.ndim else 0
    return rows.device.type != "cpu" or (size % 8 == 0 and rows.numel() % 32 == 0)


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, for which autocast is switched off."""

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not any(map(torch.is_autocast_enabled, _DEVICES)):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, _DEVICES):
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return outside
