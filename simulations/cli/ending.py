"""How commands end: interrupted work says what to do next; paths are lines of their own."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fedkd.simulations.failures import INTERRUPTED, STOPPED


@contextmanager
def interruptible(go_on: str) -> Iterator[None]:
    """End the command in good order once it is asked to: what to do next, and 130 or 75."""
    from fedkd.rounds import Interrupted

    try:
        yield
    except Interrupted as end:
        stopped = signal.SIGTERM in end.args
        print(f"{'stopped' if stopped else 'interrupted'}; {go_on}", file=sys.stderr)
        sys.exit(STOPPED if stopped else INTERRUPTED)


def typed(path: Path) -> str:
    """The command line that is at work, to be shown on a page: the folder by its name alone."""
    words = [path.resolve().name if Path(w) == path else w for w in sys.argv[1:]]
    return shlex.join(["fedkd", *words])


def show(console: Console, name: str, path: Path) -> None:
    """A line with a path, which is never broken."""
    console.print(f"{name:<8}{path}", soft_wrap=True, highlight=False, markup=False)
