"""Options that a formula can compute with: known words, finite numbers, and those in their range.

A config's options have been checked already; this is for Python, where nobody else looks. Nothing
is listed twice: words and numbers are read from the signature, ranges go by the option's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, wraps
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
T = TypeVar("T")

# What these names mean is the same everywhere.
_POSITIVE = ("temperature", "entropy_temperature", "sigma", "eps", "epsilon", "delta")
_SHARES = ("label_smoothing", "rho")


def options_checked(who: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a function or constructor that looks at its keyword options first.

    Args:
        who: What messages begin with (`"loss 'kd'"`).
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            rules = _rules(function)
            for option, value in kwargs.items():
                if option in rules and (reason := _wrong(option, value, *rules[option])):
                    raise ValueError(f"{who}: {option} must be {reason}")
            return function(*args, **kwargs)

        return checked

    return decorate


@cache
def _rules(function: Callable[..., Any]) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Known words and further types of each option that is a word or a number."""
    rules = {}
    for option, hint in get_type_hints(function).items():
        words: list[Any] = []
        types: list[Any] = []
        for part in _flat(hint):
            if get_origin(part) is Literal:
                words += get_args(part)
            else:
                types.append(part)
        if option != "return" and (words or float in types):
            rules[option] = tuple(words), tuple(types)
    return rules


def _flat(hint: Any) -> Iterable[Any]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _wrong(
    option: str, value: object, words: tuple[Any, ...], types: tuple[Any, ...]
) -> str | None:
    """What is the matter with a value, or None."""
    if value is None and NoneType in types:
        return None
    if float in types:
        if isinstance(value, bool) or not isinstance(value, Real):
            return f"a number, got {value!r}"
        value = float(value)
        if option in _POSITIVE and not value > 0:
            return f"positive, got {value}"
        if option in _SHARES and not 0 <= value < 1:
            return f"in [0, 1), got {value}"
        return None if math.isfinite(value) else f"finite, got {value}"
    if isinstance(value, str) and value in words:
        return None
    others = tuple(get_origin(t) or t for t in types if t is not NoneType)
    if others and isinstance(value, others) and not isinstance(value, str):
        return None
    known = ", ".join(map(repr, words))
    return f"one of {known}, got {value!r}"
