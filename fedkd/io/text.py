"""Text from elsewhere as text: it moves no cursor, names no window and is no formula.

What a client, a folder or a file name says ends on terminals, in logs and in tables.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Collection, Iterable

# Escape sequences of a terminal: colours, and those that name windows, write links or clear it.
ESCAPES = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]|\x1b.?", re.S)
# Characters that are kept of a reason; it may quote what a client sent.
REASON = 300


def plain(text: str, limit: int = REASON) -> str:
    """One line of printable characters, cut to `limit`: text from elsewhere moves no cursor."""
    text = ESCAPES.sub("", text[: 8 * limit])
    shown = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    line = " ".join(shown.split())
    return line if len(line) <= limit else line[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def visible(text: str, keep: str = "") -> str:
    """All of a text, with characters that do not print written as `\\x1b`, less those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def nearest(name: str, allowed: Collection[str]) -> str:
    """`"; did you mean 'x'?"` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def cell(value: object) -> object:
    """A cell of a table that spreadsheets open: a text that they would compute is quoted."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\\t", "\\r")) else text


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers in short, like `0-3,7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def from_ranges(text: str) -> list[int]:
    """The numbers that `ranges` wrote."""
    spans = [part.partition("-") for part in text.split(",") if part]
    return [n for low, _, high in spans for n in range(int(low), int(high or low) + 1)]


class PlainFormatter(logging.Formatter):
    """A formatter of log records, each as the text that it is."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, with its traceback."""
        return visible(super().format(record), keep="\n\t")
