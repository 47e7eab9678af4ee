"""A table, shown alike on a page, on the console and in a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedkd.io.text import cell as safe
from fedkd.knowledge.store import write_atomically
from fedkd.reporting.format import Rounded


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Heading.
        number: Aligned to the right, and never broken.
        on: `page` or `console`, where it is shown on one of them only.
        look: Of its cells: `soft` (pale), `first` (has room), `name` (unbroken) or `narrow` (left
            out on narrow screens).
    """

    title: str
    number: bool = False
    on: str = ""
    look: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: What it contains.
        note: A remark in small print; not on the console.
        strong: Stands out.
        bar: A share, drawn as a bar in place of the text; NaN is an empty one.
        link: Where the text leads to, on a page.
        look: `soft` (pale: not different by more than chance) or "".
    """

    text: str
    note: str = ""
    strong: bool = False
    bar: float | None = None
    link: str = ""
    look: str = ""

    @property
    def exact(self) -> str:
        """Its numbers in full precision, a space in between; "" where it is not one."""
        return " ".join(map(repr, self.text.values)) if isinstance(self.text, Rounded) else ""

    @property
    def unit(self) -> str:
        """Of these."""
        return self.text.unit if isinstance(self.text, Rounded) else ""


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        cells: One for each column; a text is a plain cell.
        key: Whose it is, for the colour in front: `student`, `ensemble`, …; "" draws none.
        look: `strong`, `soft`, `total` or "".
        series: What figures on the page call it: a tick shows it or not.
        begins: A line sets it off from the rows before it on the console.
    """

    cells: Sequence[str | Cell]
    key: str = ""
    look: str = ""
    begins: bool = False
    series: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; `title` and `note` are shown on the console, above and below."""

    columns: Sequence[Column]
    rows: Sequence[Row] = field(default_factory=tuple)
    title: str = ""
    note: str = ""

    @property
    def headed(self) -> bool:
        """Whether any column has a title."""
        return any(column.title for column in self.columns)

    def columns_on(self, place: str) -> list[Column]:
        """The columns that are shown in a place, `page` or `console`."""
        return [column for column in self.columns if column.on in ("", place)]

    def cells_on(self, place: str, row: Row) -> list[tuple[Column, Cell]]:
        """The cells of a row that are shown in a place, with their columns."""
        return [
            (column, Cell(cell) if isinstance(cell, str) else cell)
            for column, cell in zip(self.columns, row.cells, strict=True)
            if column.on in ("", place)
        ]


def words(*titles: str) -> list[Column]:
    """Columns of words."""
    return [Column(title) for title in titles]


def numbers(*titles: str, look: str = "", on: str = "") -> list[Column]:
    """Columns of numbers."""
    return [Column(title, number=True, look=look, on=on) for title in titles]


def plain(header: Sequence[Column], rows: Iterable[Sequence[str]]) -> Table:
    """A table of texts."""
    return Table(header, [Row(row) for row in rows])


def write_csv(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """Write lines of cells for spreadsheets; a text that they would compute is quoted."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(map(safe, line) for line in lines)
    write_atomically(path, buffer.getvalue().encode())
