"""How good each head is, of a student that has several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedkd.reporting import format as fmt
from fedkd.reporting.domain_table import Spread
from fedkd.reporting.table import Cell, Column, Row, Table, numbers

CAPTION = (
    "Each head answers every test image by its own classes; all other accuracies on this page are "
    "means over the heads. A teacher knows one head, a dash stands where somebody has learnt none."
)


@dataclass(frozen=True)
class Answering:
    """Somebody's accuracy in each head that it has learnt.

    Attributes:
        name: Who.
        note: What it is.
        heads: Head -> accuracy.
        key: Of the row.
    """

    name: str
    note: str = ""
    heads: Mapping[str, Spread | None] = field(default_factory=dict)
    key: str = "student"


def heads_table(heads: Sequence[str], rows: Sequence[Answering]) -> Table:
    """A row for each, a column for each head."""
    drawn = []
    for place, row in enumerate(rows):
        student = row.key == "student"
        cells: list[str | Cell] = [Cell(row.name, row.note, strong=student)]
        for head in heads:
            found = row.heads.get(head)
            cells.append(Cell(fmt.spread(found) if found else fmt.DASH, strong=student))
        begins = place > 0 and (rows[place - 1].key == "ensemble") != (row.key == "ensemble")
        drawn.append(Row(cells, row.key, begins=begins))
    return Table([Column("accuracy, %", look="first"), *numbers(*heads)], drawn, "heads")
