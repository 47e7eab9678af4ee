"""Names that configs use, mapped to the classes and functions behind them.

One `Registry` per family (losses, fusions, models, ...). A registry discovers its own
package on first look-up, so adding a member is one new module and nothing else; `plugins:`
in a config imports a user's module, which registers itself the same way.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, get_type_hints

from fedkd.io.text import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named constructors of one family.

    Args:
        family: What a member is called in messages (`"loss"`).
        package: Package whose modules register the members, or one module; imported on first use.
        gone: Names of earlier versions, and what to write today.
    """

    def __init__(self, family: str, package: str, gone: Mapping[str, str] | None = None) -> None:
        self.family = family
        self._package = package
        self._gone = dict(gone or {})
        self._members: dict[str, Callable[..., T]] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Class or function decorator. Raises `ValueError` if the name is taken."""

        def add(member: Callable[..., T]) -> Callable[..., T]:
            known = self._members.get(name)
            if known is not None and known.__qualname__ != member.__qualname__:
                raise ValueError(
                    f"{self.family} {name!r} is already {known.__module__}.{known.__qualname__}"
                )
            self._members[name] = member
            return member

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._members)

    def get(self, name: str) -> Callable[..., T]:
        """The member called `name`. Raises `ValueError` that names the nearest one."""
        self._discover()
        if name not in self._members:
            if name in self._gone:
                raise ValueError(f"{self.family} {name!r} is gone: {self._gone[name]}")
            names = sorted(self._members)
            hint = "; a list is written [a, b]" if "," in str(name) else nearest(name, names)
            raise ValueError(f"unknown {self.family} {name!r}{hint} (known: {', '.join(names)})")
        return self._members[name]

    def summary(self, name: str) -> str:
        """First line of the member's docstring."""
        return (inspect.getdoc(self.get(name)) or "").split("\n", 1)[0]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Keyword options of the member, in order: what a config may set."""
        parameters = inspect.signature(self.get(name)).parameters
        return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def example(self, name: str) -> list[str]:
        """YAML lines that name the member in a config, with its options at their defaults."""
        return [f"name: {name}"] + [
            f"{key}: {'…  # has no default' if p.default is p.empty else yaml_value(p.default)}"
            for key, p in self.options(name).items()
        ]

    def check(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `name`, converted to the types its signature declares.

        Raises:
            ValueError: unknown name, unknown option or an option of the wrong type.
        """
        allowed = self.options(name)
        hints = get_type_hints(_callable_of(self.get(name)))
        checked = {}
        for key, value in options.items():
            if key not in allowed:
                known = ", ".join(allowed) or "none"
                raise ValueError(
                    f"{self.family} {name!r} has no option {key!r}"
                    f"{nearest(key, list(allowed))} (options: {known})"
                )
            checked[key] = self._convert(name, key, value, hints.get(key, Any))
        missing = [k for k, p in allowed.items() if p.default is p.empty and k not in options]
        if missing:
            raise ValueError(f"{self.family} {name!r} needs option {missing[0]!r}")
        return checked

    def create(self, name: str, *provided: Any, **options: Any) -> T:
        """Build `name` from positional context and keyword options, both checked."""
        return self.get(name)(*provided, **self.check(name, options))

    def _convert(self, name: str, key: str, value: Any, hint: Any) -> Any:
        # Only what a config holds needs conversion, and configs need pydantic anyway: losses,
        # networks and loops also run where there is nothing but torch.
        try:
            from pydantic import ConfigDict, TypeAdapter, ValidationError
        except ModuleNotFoundError:
            return value
        try:
            return TypeAdapter(
                hint, config=ConfigDict(arbitrary_types_allowed=True)
            ).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]["msg"]
            raise ValueError(f"{self.family} {name!r}: {key}: {first}, got {value!r}") from None

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self._package}.{module.name}")


def yaml_value(value: object) -> str:
    """A default of an option as a config writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


class NotAFunction(ValueError):
    """A module has no such function."""


def target_name(target: object) -> str:
    """The name `package:function` of any importable function, given so or with a dot.

    Raises:
        ValueError: it is none.
    """
    parts = target.replace(":", ".").split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"target: expected package.function, got {target!r}")
    return f"{'.'.join(parts[:-1])}:{parts[-1]}"


def is_target(name: str) -> bool:
    """Whether a name is that of any importable function."""
    return ":" in name


def _callable_of(member: Any) -> Any:
    return member.__init__ if inspect.isclass(member) else member
