"""The console of all commands: what it shows of others is text, no command to a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
