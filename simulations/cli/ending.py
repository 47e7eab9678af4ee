"""How commands end: interrupted work says what to do next; paths are lines of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fedkd.simulations.failures import INTERRUPTED


@contextmanager
def interruptible(go_on: str) -> Iterator[None]:
    """End the command in good order once the user wants it to: what to do next, and 130."""
    from fedkd.rounds import Interrupted

    try:
        yield
    except Interrupted:
        print(f"interrupted; {go_on}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def show(console: Console, name: str, path: Path) -> None:
    """A line with a path, which is never broken."""
    console.print(f"{name:<8}{path}", soft_wrap=True, highlight=False, markup=False)
