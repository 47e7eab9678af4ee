"""The table that a comparison ends with on the console."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from fedkd.studies.engine import Record
from simulations.compare.report import ranked, shown

# What fits 80 characters; the report has the rest.
_COLUMNS = {
    "final": "last round, %", "worst_client": "worst client, %", "up": "up", "down": "down",
    "seconds": "s",
}  # fmt: skip
_SWEPT = {
    "final": "student, %", "teachers": "teachers, %", "spent": "epsilon spent", "seconds": "s",
}  # fmt: skip


def result_table(found: Record) -> Table:
    """Rows with their means over seeds, best first."""
    table = Table(title=f"{found['name']} · {len(found['seeds'])} seeds", title_justify="left")
    for factor in found["factors"] or ["method"]:
        words = [row["choices"].get(factor, name) for name, row in found["rows"].items()]
        longest = max(len(factor), *map(len, words))
        table.add_column(factor, overflow="fold", min_width=min(14, longest))
    swept = found["study"] == "privacy sweep"
    columns = _SWEPT if swept else _COLUMNS
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    names = ranked(found)
    if swept:  # as they were asked for: the budgets in order
        names = [name for name in found["rows"] if name in names]
    for name in names:
        row = found["rows"][name]
        start = [row["choices"][factor] for factor in found["factors"]] or [name]
        bold = row["kind"] == "fedkd" and not found["factors"]
        table.add_row(
            *(f"[bold]{escape(word)}[/]" if bold else escape(word) for word in start),
            *(shown(key, row[key]) for key in columns),
        )
    return table
