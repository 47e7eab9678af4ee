"""What every loss asks of its inputs, in one place.

Shapes are looked at first: all must be of one batch, for a teacher's batch of one would be
broadcast without a word. Numbers are looked at when the value is not finite, so that the ordinary
batch pays nothing for it; and on a CPU only, since a GPU would be kept waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from inspect import signature
from typing import ParamSpec

import torch
from torch import Tensor

from fedkd.functional.analytic_grad import transformed
from fedkd.functional.options import options_checked
from fedkd.functional.precision import full_precision

P = ParamSpec("P")

# Arguments that do not come from the student.
_GIVEN = ("teacher", "shares", "weights", "class_weights", "costs", "margin")


def loss_function(name: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorator of the formula of the loss `name`.

    Options are checked, autocast is kept out, and if what a teacher says makes the value NaN or
    infinite, `ValueError` names it. What the student says may do so: the value tells its caller,
    and a gradient scaler must see it.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        inner = options_checked(f"loss {name!r}")(full_precision(function))

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            value = inner(*args, **kwargs)
            if value.device.type == "cpu" and not transformed():
                some = value.detach()
                if not math.isfinite(some if some.ndim == 0 else some.sum()):
                    names = _names(function)
                    _blame(name, {**dict(zip(names, args)), **kwargs}, some)
            return value

        return checked

    return decorate


def check_batch(
    loss: str,
    student: Tensor,
    *teachers: Tensor | None,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    classes: int | None = None,
    together: bool = False,
    places: bool = False,
) -> None:
    """Raise `ValueError` unless all are of one batch that is not empty.

    Args:
        loss: Its name.
        student: Of the student, (B, ...).
        teachers: Of a teacher, (B, ...) each; None is passed over.
        weights: The teacher's weight on each sample, (B,).
        class_weights: TeacherWeights in each class, (C,).
        classes: C, if the student's are logits: softmax of a single one is 1, whatever it is.
        together: The teachers' have an axis of M teachers in front, (M, B, ...), and the weights
            are (M, B).
        places: Logits may also be (B, ..., C).
    """
    size = student.shape[0] if student.ndim else 0
    if not size:
        raise ValueError(f"loss {loss!r}: the batch is empty: {_shape(student)}")
    axis = 1 if together else 0
    for teacher in teachers:
        if teacher is None:
            continue
        if teacher.ndim <= axis or teacher.shape[axis] != size:
            raise ValueError(
                f"loss {loss!r}: a teacher must answer each of the student's {size} samples, "
                f"got {_shape(teacher)} beside the student's {_shape(student)}"
            )
        if classes is not None and teacher.shape[axis + 1 :] != student.shape[1:]:
            raise ValueError(
                f"loss {loss!r}: student and teacher must have the same classes, "
                f"got {_shape(student)} and {_shape(teacher)}"
            )
    if classes is not None and (
        classes < 2 or student.ndim < 2 or not (places or student.ndim == 2)
    ):
        raise ValueError(
            f"loss {loss!r}: logits must be (B, C) of two classes or more, got {_shape(student)}"
        )
    if weights is not None:
        expected = (len(teachers[0]), size) if together and teachers[0] is not None else (size,)
        _expect(loss, "weights", weights, expected)
    if class_weights is not None:
        _expect(loss, "class_weights", class_weights, (student.shape[1],))


def class_numbers(loss: str, targets: Tensor, student: Tensor) -> Tensor:
    """Targets (B,) of any integer dtype as int64, each in [0, C) for student logits (B, C).

    Raises:
        ValueError: they are not; on a CPU, also that they are out of range.
    """
    if targets.dtype.is_floating_point or targets.dtype in (torch.bool, torch.complex64):
        raise ValueError(
            f"loss {loss!r}: targets must be class numbers of an integer dtype, "
            f"got {str(targets.dtype).removeprefix('torch.')}"
        )
    _expect(loss, "targets", targets, (student.shape[0],))
    targets = targets.long()
    if targets.device.type == "cpu" and not transformed():
        least, most = (int(end) for end in targets.aminmax())
        if least < 0 or most >= student.shape[1]:
            raise ValueError(
                f"loss {loss!r}: targets must be class numbers from 0 to {student.shape[1] - 1}, "
                f"got {least if least < 0 else most}; leave samples without a label out"
            )
    return targets


def _expect(loss: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"loss {loss!r}: {name} must be {shape}, got {_shape(tensor)}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


@cache
def _names(function: Callable[..., Tensor]) -> tuple[str, ...]:
    return tuple(signature(function).parameters)


def _blame(loss: str, arguments: Mapping[str, object], value: Tensor) -> None:
    """Raise `ValueError` if something that is not the student's made the value what it is."""
    given: list[tuple[str, Tensor]] = []
    own: list[tuple[str, Tensor]] = []
    for name, argument in arguments.items():
        for tensor in argument if isinstance(argument, Sequence) else [argument]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                (given if name.startswith(_GIVEN) else own).append((name, tensor))
    if any(bool((tensor.isnan() | tensor.isposinf()).any()) for _, tensor in own):
        return
    masked = any(bool(tensor.isneginf().any()) for _, tensor in own)
    for name, tensor in given:
        if bool((tensor.isnan() | tensor.isposinf()).any()):
            what = "NaN" if bool(tensor.isnan().any()) else "inf"
            raise ValueError(
                f"loss {loss!r}: {name} {_shape(tensor)} holds {what}, so the loss would be "
                f"{'NaN' if bool(value.isnan().any()) else 'infinite'}; the student is finite"
            )
        if bool(tensor.isneginf().any()) and (not masked or bool(value.isnan().any())):
            raise ValueError(
                f"loss {loss!r}: {name} {_shape(tensor)} holds -inf (a masked class), "
                "of which this loss has no limit; give a finite number, such as -1e4"
            )
