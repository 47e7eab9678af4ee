"""The tables of pages as the console shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedkd.reporting import table as content
from fedkd.reporting.format import percent
from fedkd.runs.directory import RunDirectory


def console_table(table: content.Table) -> RenderableType:
    """A table as the console shows it. All text is text: a class may be called [red]."""
    drawn = Table(title=table.title and Text(table.title), title_justify="left",
                  show_header=table.headed)  # fmt: skip
    rows = [table.cells_on("console", row) for row in table.rows]
    columns = table.columns_on("console")
    room = min(14, 28 // max(1, sum(not column.number for column in columns)))
    for place, column in enumerate(columns):
        # Numbers are never broken, words only where they have to be, headings between words.
        longest = max([len(cells[place][1].text) for cells in rows], default=0)
        widest = max([longest, *map(len, column.title.split())])
        widest = widest if column.number else min(widest, room)
        justify: Any = "right" if column.number else "left"
        drawn.add_column(Text(column.title), justify=justify, overflow="fold", min_width=widest)
    for row, cells in zip(table.rows, rows, strict=True):
        if row.begins:
            drawn.add_section()
        whole = "bold" if row.look in ("strong", "total") else "dim" if row.look == "soft" else ""
        texts = [Text(cell.text, "bold" if cell.strong else "") for _, cell in cells]
        drawn.add_row(*texts, style=whole)
    return Group(drawn, Text(table.note, "dim")) if table.note else drawn


def run_tables(run: RunDirectory) -> RenderableType:
    """What a finished run came to: accuracies, bytes, seconds, promises, refusals."""
    from fedkd.reporting.run_record import Found
    from fedkd.reporting.run_tables import console_tables

    found = Found(run)
    parts = [console_table(table) for table in console_tables(found)]
    degraded = ", ".join(str(event.round) for event in found.rounds if event.status != "ok")
    if degraded:
        note = f"no quorum in round {degraded}: the student did not learn there"
        parts.append(Text(note, "yellow"))
    return Group(*parts)


def partition_table(
    counts: Any, classes: tuple[str, ...], wrong: Sequence[float | None] | None = None
) -> RenderableType:
    """Images per client (rows) and class (columns), and the share of wrong labels if there is."""
    shown = min(len(classes), 20)
    table = Table(title="private images per client and class", title_justify="left")
    table.add_column("client", justify="right")
    for name in classes[:shown]:
        table.add_column(Text(name), justify="right", max_width=9, overflow="ellipsis")
    if shown < len(classes):
        table.add_column("…")
    table.add_column("classes", justify="right")
    table.add_column("total", justify="right")
    if wrong is not None:
        table.add_column("wrong labels", justify="right")
    for client, row in enumerate(counts.tolist()):
        cells = [str(n) if n else "[dim]·[/]" for n in row[:shown]]
        cells += [""] * (shown < len(classes))
        cells += [str(sum(n > 0 for n in row)), f"{sum(row):,}"]
        cells += [] if wrong is None else [percent(wrong[client])]
        table.add_row(str(client), *cells)
    return table
