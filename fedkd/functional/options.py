"""Options: each is written once, as a keyword with its type, range and default.

Everything else reads the signature: the check of a call in Python, of a config, the options of a
class, the tables of the documentation. A range is part of the type (`temperature: Positive = 4.0`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from torch import Tensor

from fedkd.io.text import nearest

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Which numbers an option may be, and how a message calls them."""

    holds: Callable[[float], bool]
    words: str

    def __repr__(self) -> str:
        """As in messages."""
        return self.words


Positive = Annotated[float, Range(lambda x: x > 0, "positive")]
NotNegative = Annotated[float, Range(lambda x: x >= 0, "at least 0")]
Share = Annotated[float, Range(lambda x: 0 <= x < 1, "in [0, 1)")]
Minority = Annotated[float, Range(lambda x: 0 <= x < 0.5, "in [0, 0.5)")]
Part = Annotated[float, Range(lambda x: 0 < x <= 1, "in (0, 1]")]
Count = Annotated[int, Range(lambda x: x >= 1, "at least 1")]
CountFromZero = Annotated[int, Range(lambda x: x >= 0, "at least 0")]


@dataclass(frozen=True)
class _Rule:
    """What an option may be: words, values of some types, numbers of a range."""

    words: tuple[Any, ...]
    types: tuple[Any, ...]
    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, hint: Any) -> _Rule:
        """Read from a type."""
        words: list[Any] = []
        types: list[Any] = []
        ranges: list[Range] = []
        for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
            if get_origin(part) is Annotated:
                part, *more = get_args(part)
                ranges += [one for one in more if isinstance(one, Range)]
            if get_origin(part) is Literal:
                words += get_args(part)
            else:
                types.append(get_origin(part) or part)
        return cls(tuple(words), tuple(types), tuple(ranges))

    def wrong(self, value: object) -> str | None:
        """What a value should have been, or None if it is that."""
        if value is None and NoneType in self.types:
            return None
        if float in self.types or int in self.types:
            return self._wrong_number(value)
        others = tuple(t for t in self.types if t is not NoneType)
        if not self.words or (isinstance(value, str) and value in self.words):
            return None
        if others and isinstance(value, others) and not isinstance(value, str):
            return None
        return f"one of {', '.join(map(repr, self.words))}"

    def _wrong_number(self, value: object) -> str | None:
        kind, what = (Real, "a number") if float in self.types else (Integral, "a whole number")
        if isinstance(value, bool) or not isinstance(value, kind):
            return what
        number = float(value)
        for one in self.ranges:
            if not one.holds(number):
                return one.words
        return None if math.isfinite(number) else "finite"


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Keyword-only parameters, with their types; those that hold tensors are data, no options."""
    return {
        key: parameter
        for key, parameter in _keywords(function).items()
        if Tensor not in (parameter.annotation, *get_args(parameter.annotation))
    }


@cache
def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return {
        key: parameter.replace(annotation=hints.get(key, Any))
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


@cache
def _rules(function: Callable[..., Any]) -> dict[str, _Rule]:
    return {key: _Rule.of(p.annotation) for key, p in options_of(function).items()}


def check_options(who: str, rules: Mapping[str, _Rule], options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a value that its rule does not allow."""
    for option, value in options.items():
        if option in rules and (expected := rules[option].wrong(value)):
            raise ValueError(f"{who}: {option} must be {expected}, got {value!r}")


def options_checked(who: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a function or constructor that looks at its keyword options first.

    Args:
        who: What messages begin with (`"loss 'kd'"`).
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known = inspect.signature(function).parameters
        closed = all(p.kind is not p.VAR_KEYWORD for p in known.values())

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for option in kwargs:
                if closed and option not in known:
                    raise TypeError(f"{who} has no option {option!r}{nearest(option, known)}")
            check_options(who, _rules(function), kwargs)
            return function(*args, **kwargs)

        return checked

    return decorate


def with_options_of(formula: Callable[..., Any], init: Callable[..., None]) -> Any:
    """A constructor that takes a formula's options beside its own keywords.

    Args:
        formula: The function whose options are taken.
        init: The constructor; it hands on what it does not name (`**formula`).
    """
    known = {**options_of(formula), **options_of(init)}

    @wraps(init)
    def constructor(*args: Any, **options: Any) -> None:
        init(*args, **options)

    # Its signature is its own, not that of what it wraps.
    del constructor.__dict__["__wrapped__"]
    rest = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    first = [p for p in inspect.signature(init).parameters.values() if p.kind not in rest]
    constructor.__dict__["__signature__"] = inspect.Signature([*first, *known.values()])
    constructor.__annotations__ = {key: p.annotation for key, p in known.items()}
    return constructor


def frozen_options(owner: type, formula: Callable[..., Any]) -> type[Any]:
    """The options of a formula as a frozen dataclass `owner.Options`."""
    fields = [
        (key, p.annotation, field() if p.default is p.empty else field(default=p.default))
        for key, p in options_of(formula).items()
    ]
    place = {"__module__": owner.__module__, "__qualname__": f"{owner.__qualname__}.Options"}
    return make_dataclass("Options", fields, frozen=True, kw_only=True, namespace=place)
