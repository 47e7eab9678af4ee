"""Numbers as people read them."""

from __future__ import annotations

import math
import re
import time
from typing import Any

from fedkd.reporting import figures
from fedkd.reporting.run_record import Record
from fedkd.runs.directory import RunDirectory

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def percent(value: float | None) -> str:
    """`87.1 %`, or a dash for what is not known."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def or_dash(value: int | None) -> str:
    """`1,234`, or a dash for what is not known."""
    return DASH if value is None else f"{value:,}"


def human_bytes(size: float) -> str:
    """`1.2 MB` (powers of 1,000, as network traffic is counted)."""
    unit, scale = figures.byte_unit(size)
    return f"{size:.0f} B" if unit == "B" else f"{size / scale:.{2 if unit == 'GB' else 1}f} {unit}"


def bar(value: float | None) -> str:
    """A share as a CSS width."""
    return "0" if value is None or not math.isfinite(value) else f"{100 * value:.2f}%"


def points(gap: float) -> str:
    """A gap of shares as `+1.2 points`."""
    if not math.isfinite(gap):
        return DASH
    sign = "±" if abs(gap) < 5e-4 else "+" if gap > 0 else MINUS
    return f"{sign}{abs(100 * gap):.1f} points"


def count(number: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `2 h 05 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def date(run: RunDirectory) -> str:
    """When the run was created: its name says so, else its config's age."""
    match = re.search(r"-(\d{8}-\d{6})-[0-9a-f]{4}$", run.identity)
    if match:
        moment = time.strptime(match[1], "%Y%m%d-%H%M%S")
    else:
        moment = time.localtime((run.path / "config.yaml").stat().st_mtime)
    return time.strftime("%Y-%m-%d %H:%M", moment)


def as_float(value: Any) -> float:
    """Not a number for what is not known."""
    return float("nan") if value is None else float(value)


def score(record: Record, who: str) -> float:
    """Accuracy of `who` in a record; not a number if there is none."""
    return as_float((record.get(who) or {}).get("accuracy"))


def finite(values: Any) -> list[float]:
    """Those that are numbers."""
    return [float(v) for v in values if v is not None and math.isfinite(v)]
