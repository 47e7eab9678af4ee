"""Values that know their gradient.

Where the gradient of a loss has a closed form, it is finished together with the value. Autograd
would keep every tensor on the way, and walk back through them one call at a time; a small batch
costs as many calls as numbers.

A closed form is a first derivative in reverse mode and nothing more. So each stands beside the
plain formula, which autograd can differentiate in any way: that one answers where a second
derivative is asked for (`create_graph=True`), in forward mode, and under `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

Formula = Callable[..., Tensor]
# Inputs without gradient, and whether one is needed -> the value and the gradient by the inputs:
# of the scalar, or of each row's value by its row.
Solve = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


def needs_grad(inputs: Tensor) -> bool:
    """Whether a gradient by `inputs` will be asked for."""
    return torch.is_grad_enabled() and inputs.requires_grad


def transformed(*inputs: Tensor) -> bool:
    """Whether `torch.func` is at work, or one of the inputs has a tangent (forward mode)."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs)


def with_gradient(inputs: Tensor, solve: Solve, formula: Formula) -> Tensor:
    """The value that `solve` finds with its gradient.

    Args:
        inputs: What the value is differentiated by.
        solve: The closed form.
        formula: The same value of the inputs, differentiable by autograd.
    """
    if transformed(inputs):
        return formula(inputs)
    value, gradient = solve(inputs.detach(), needs_grad(inputs))
    if gradient is None:
        return value
    known: Tensor = _Known.apply(inputs, (value, gradient), formula)
    return known


def with_gradient_each(inputs: Sequence[Tensor], value: Tensor, gradient: Tensor) -> list[Tensor]:
    """Several values with their gradients, of as many inputs, from one computation.

    Where inputs are the same tensor, autograd adds the gradients up from the last to the first, as
    it would if the values had been computed one after the other.

    Args:
        inputs: What each value is differentiated by.
        value: (M, ...).
        gradient: By the inputs, (M, ...).
    """
    found: tuple[Tensor, ...] = _Each.apply((value, gradient), *reversed(inputs))
    return list(found)


def through(formula: Formula, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
    """What a `backward` returns if it shall be differentiated itself: autograd of the formula.

    Args:
        formula: The value as a function of the inputs.
        inputs: As saved for backward; None is returned for those that need no gradient.
        grad: By the value.
    """
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        value = formula(*inputs)
        if not value.requires_grad:
            return [torch.zeros_like(t) if t.requires_grad else None for t in inputs]
        found = torch.autograd.grad(
            value, needed, grad, create_graph=True, allow_unused=True, materialize_grads=True
        )
    left = iter(found)
    return [next(left) if tensor.requires_grad else None for tensor in inputs]


def first_order(fast: Formula, formula: Formula, *inputs: Tensor) -> Tensor:
    """The value of `fast`, whose autograd gives the first derivative alone; for others `formula`.

    That is so where `fast` holds something constant that does not change the first derivative.
    """
    if transformed(*inputs):
        return formula(*inputs)
    if not any(needs_grad(tensor) for tensor in inputs):
        return fast(*inputs)
    value: Tensor = _FirstOrder.apply(fast, formula, *inputs)
    return value


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, found: tuple[Tensor, Tensor], formula: Formula) -> Tensor:
        value, gradient = found
        ctx.save_for_backward(gradient)
        # Not saved: who writes over the inputs afterwards spoils a second derivative alone.
        ctx.inputs, ctx.version = inputs, inputs._version
        ctx.formula = formula
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            if ctx.inputs._version != ctx.version:
                raise RuntimeError(
                    "the inputs of a loss were written over, so its gradient cannot be "
                    "differentiated; write to a copy"
                )
            return *through(ctx.formula, (ctx.inputs,), grad), None, None
        while grad.ndim not in (0, gradient.ndim):
            grad = grad[..., None]
        return gradient * grad, None, None


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: tuple[Tensor, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        value, ctx.gradient = found
        return value.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.stack(grads)
        while grad.ndim < ctx.gradient.ndim:
            grad = grad[..., None]
        return None, *reversed((ctx.gradient * grad).unbind())


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Formula, formula: Formula, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.formula = formula
        ctx.inner = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        with torch.enable_grad():
            ctx.value = fast(*ctx.inner)
        return ctx.value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, None, *through(ctx.formula, ctx.saved_tensors, grad)
        needed = [tensor for tensor in ctx.inner if tensor.requires_grad]
        found = iter(torch.autograd.grad(ctx.value, needed, grad, retain_graph=True))
        return None, None, *(next(found) if t.requires_grad else None for t in ctx.inner)
