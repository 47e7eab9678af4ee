"""The console of all commands: what it shows of others is text, no command to a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.segment import Segment
from rich.style import Style

from fedkd.io.text import visible


def screen(**options: Any) -> Console:
    """A `rich` console that writes out control characters in text, and makes no links of it."""
    console = Console(**options)
    console.push_render_hook(_Hook())
    return console


@contextmanager
def quiet_descriptors(log: Path) -> Iterator[Console]:
    """Send everything written to stdout and stderr, by this process and its children, to `log`.

    Ray's daemons and C++ code write to the descriptors, where no logging setting reaches them.

    Yields:
        A console on the real stdout.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with (
        os.fdopen(
            os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace", buffering=1
        ) as out,
        log.open("a", encoding="utf-8") as sink,
    ):
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield screen(file=out)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, target)
                os.close(saved)


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Plain(renderable) for renderable in renderables]


@dataclass
class _Plain:
    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        for segment in console.render(self.renderable, options):
            if segment.control:  # of rich itself
                yield segment
            else:
                yield Segment(visible(segment.text, keep="\n"), _unlinked(segment.style))


def _unlinked(style: Style | None) -> Style | None:
    return style.update_link(None) if style is not None and style.link else style
