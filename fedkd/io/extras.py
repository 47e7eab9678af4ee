"""Libraries that only some installations have: named with the command that brings them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A library that is not installed; the message says how to get it."""


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Import libraries of an extra of this package.

    Args:
        name: The extra, as in `pip install 'fedkd[NAME]'`.
        what: Who needs them, for the message.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if not library or library in ("fedkd", "strategies", "simulations"):
            raise
        message = f"{what} needs {library}: pip install 'fedkd[{name}]'"
        raise MissingExtra(message, name=error.name) from None
