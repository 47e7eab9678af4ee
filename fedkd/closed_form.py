"""Values that know their gradient.

Where the gradient of a loss has a closed form, it is finished together with the value. Autograd
would keep every tensor on the way, and walk back through them one call at a time; a small batch
costs as many calls as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wanted(inputs: Tensor) -> bool:
    """Whether a gradient by `inputs` will be asked for."""
    return torch.is_grad_enabled() and inputs.requires_grad


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor | None) -> Tensor:
    """`value`, differentiable once by `inputs`.

    Args:
        inputs: What the value was computed from, without autograd.
        value: A scalar, or one value per row of `inputs`, (B,).
        gradient: Of the scalar, or of each row's value by its row, shaped as `inputs`; None
            leaves the value a constant.
    """
    if gradient is None:
        return value
    known: Tensor = _Known.apply(inputs, (value, gradient))
    return known


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (gradient,) = ctx.saved_tensors
    while grad.ndim not in (0, gradient.ndim):
        grad = grad[..., None]
    return gradient * grad, None


# It stops a second derivative, which would be wrong; where none is prepared for, it only costs.
_once = once_differentiable(_backward)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
        value, gradient = found
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _once(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)
