"""What networks and work cost, as a table: of a run, and of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedkd.reporting.format import duration, human_bytes, metric, number
from fedkd.reporting.table import Cell, Column, Row, Table

CAPTION = (
    "Mult-adds: products of matrices and convolutions of reading one image. Peak memory: of "
    "the largest process that worked, with Python and its libraries. "
)
MEASURED = (
    "Energy: what the machine's counters say of the time of the work, and of all that ran beside "
    "it."
)
ASSUMED = "Energy is not measured: it is time × the draw that the config gives the machine."
UNKNOWN = (
    "Energy: this machine's counters cannot be read; with resources.energy.watts it is estimated "
    "from the time, and marked so."
)


def caption(energy: str | None) -> str:
    """What the numbers mean, by how energy is known."""
    if energy is None:
        return CAPTION + UNKNOWN
    return CAPTION + (MEASURED if energy.startswith("measured") else ASSUMED)


@dataclass(frozen=True)
class Line:
    """A row: a network, a piece of work, or both.

    Attributes:
        who: Whose it is, and which network.
        note: A remark in small print.
        size: `parameters`, those `trainable` if not all, `multiply_adds`, where it is one network.
        spent: `seconds`, `memory`, `gpu_memory`, `joules`, `grams`, as far as they are known.
        key: For the colour in front.
        look: As in `Row`.
    """

    who: str
    note: str = ""
    size: Mapping[str, Any] = field(default_factory=dict)
    spent: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    look: str = ""


def costs_table(lines: Sequence[Line], energy: str | None) -> Table:
    """Rows under those columns of which something is known.

    Args:
        lines: In order.
        energy: How joules are known, as a remark.
    """
    head = f"energy, {energy.split()[0]}" if energy else "energy"
    columns: list[tuple[str, str, str, Callable[[Any], str]]] = [
        ("parameters", "size", "parameters", number),
        ("that learn", "size", "trainable", number),
        ("mult-adds", "size", "multiply_adds", metric),
        ("peak memory", "spent", "memory", human_bytes),
        ("on the GPU", "spent", "gpu_memory", human_bytes),
        ("time", "spent", "seconds", lambda spent: duration(spent or None)),
        (head, "spent", "joules", lambda joules: metric(joules or None, "J")),
        ("gCO2e", "spent", "grams", lambda grams: number(grams or None, ".3g")),
    ]
    shown = [c for c in columns if any(getattr(line, c[1]).get(c[2]) for line in lines)]
    rows = []
    for place, line in enumerate(lines):
        first = Cell(line.who, line.note, strong=line.key == "student")
        cells = [write(getattr(line, part).get(key)) for _, part, key, write in shown]
        begins = line.look == "total" and place > 0
        rows.append(Row([first, *cells], line.key, line.look, begins))
    # A terminal has no room for all.
    titles = [
        Column(title, number=True, on="page" if key in ("gpu_memory", "grams") else "")
        for title, _, key, _ in shown
    ]
    return Table(
        [Column("", look="name"), *titles],
        rows,
        "costs",
        "" if energy is None else f"energy {energy}",
    )


def run_lines(costs: Mapping[str, Any]) -> list[Line]:
    """The rows of a run: each kind of network, the teachers together, the whole."""
    networks = costs["networks"]
    teachers = [each for each in networks if each["role"] == "teacher"]
    together = len(teachers) > 1
    lines: list[Line] = []
    for each in networks:
        role, many = each["role"], each["count"]
        note = "" if many == 1 else f"{many:,} of these"
        spent = costs["student"] if role == "student" else {}
        if role == "teacher" and not together:
            spent = costs["teachers"]
        key = role if role in ("student", "teacher") else ""
        if role != "teacher" and together and not any(line.look == "soft" for line in lines):
            lines.append(Line("teachers together", spent=costs["teachers"], look="soft"))
        lines.append(Line(f"{role} {each['model']}", note, each, spent, key))
    return [*lines, Line("all rounds", spent=costs["run"], look="total")]
