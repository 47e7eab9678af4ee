"""Who is how good in which domain: the same table for runs and studies."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedkd.reporting import format as fmt
from fedkd.reporting.table import Cell, Column, Row, Table, numbers

CAPTION = (
    "Test accuracy in percent, in the target domain and in those that the teachers have learnt in. "
    "Forgotten: how far the student is behind the teachers of a domain there, mean over the source "
    "domains. It has seen no image of these."
)

Spread = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """A row.

    Attributes:
        name: Who.
        note: A remark.
        target: Accuracy in the target domain, a mean and perhaps a deviation; None is not known.
        sources: The same in each source domain.
        home: The domain that it has learnt in; None for a student.
        key: Whose colour it has.
    """

    name: str
    target: Spread | None
    sources: Mapping[str, Spread | None] = field(default_factory=dict)
    home: str | None = None
    note: str = ""
    key: str = "teacher"


def alone(value: float | None) -> Spread | None:
    """One measurement as a mean."""
    return None if value is None else {"mean": value, "std": None}


def domain_table(target: str, sources: Sequence[str], rows: Sequence[Judged]) -> Table:
    """A row for each, a column for each domain."""
    columns = [
        Column("who", look="first"),
        *numbers(f"target: {target}", *sources, "forgotten"),
    ]
    at_home = {
        domain: [
            spread["mean"]
            for row in rows
            if row.home == domain and (spread := row.sources.get(domain)) is not None
        ]
        for domain in sources
    }
    drawn = []
    for place, row in enumerate(rows):
        student = row.home is None
        cells: list[str | Cell] = [Cell(row.name, row.note, strong=student)]
        cells.append(Cell(fmt.spread(row.target), strong=True))
        for domain in sources:
            cells.append(Cell(fmt.spread(row.sources.get(domain)), strong=row.home == domain))
        lost = [
            statistics.fmean(at_home[domain]) - spread["mean"]
            for domain in sources
            if at_home[domain] and (spread := row.sources.get(domain)) is not None
        ]
        known = student and len(lost) == len(sources)
        cells.append(fmt.number(100 * statistics.fmean(lost), ".2f") if known else "")
        begins = place > 0 and student and rows[place - 1].home is not None
        drawn.append(Row(cells, row.key, begins=begins))
    return Table(columns, drawn, "domains")
