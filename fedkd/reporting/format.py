"""Numbers as people read them: the same on every page, on the console and in figures."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

# Student's t at 95 %, two-sided, from one degree of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def known(value: float | None) -> bool:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)


class Rounded(str):
    """A number as it is shown, and as it is: what a CSV file gets of a table.

    Attributes:
        values: In full precision; of a mean with its deviation both.
        unit: Theirs.
    """

    values: tuple[float, ...]
    unit: str

    def __new__(cls, text: str, *values: float | None, unit: str = "") -> Rounded:
        """Of a text; what is not known is left out."""
        made = super().__new__(cls, text)
        made.values = tuple(float(value) for value in values if value is not None)
        made.unit = unit
        return made


def number(value: float | None, form: str = ",.0f") -> str:
    """A number in a format, with a true minus sign; a dash for what is not known."""
    return DASH if not known(value) else Rounded(format(value, form).replace("-", MINUS), value)


def percent(value: float | None, digits: int = 1, unit: str = " %") -> str:
    """`87.1 %`, or a dash for what is not known."""
    if value is None or not known(value):
        return DASH
    return Rounded(f"{100 * value:.{digits}f}{unit}", 100 * value, unit="%")


def spread(row: Mapping[str, Any] | None, digits: int = 2, unit: str = "") -> str:
    """`87.12 ± 0.20` from shares `mean` and `std`; without a deviation where there is none."""
    if row is None:
        return DASH
    mean, std = 100 * row["mean"], None if row["std"] is None else 100 * row["std"]
    deviation = "" if std is None else f" ± {std:.{digits}f}"
    return Rounded(f"{mean:.{digits}f}{deviation}{unit}", mean, std, unit="%")


def points(gap: float, digits: int = 1, unit: str = " points") -> str:
    """A gap of shares as `+1.2 points`."""
    if not math.isfinite(gap):
        return DASH
    shown = f"{abs(100 * gap):.{digits}f}"
    sign = "±" if float(shown) == 0 else "+" if gap > 0 else MINUS
    return Rounded(f"{sign}{shown}{unit}", 100 * gap, unit="points")


def interval(ends: Sequence[float], factor: float = 1) -> str:
    """`0.55 to 0.75`; with a factor of 100 of shares in percent."""
    return " to ".join(f"{factor * end:.{1 if factor == 100 else 2}f}" for end in ends)


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values and half of its 95 % confidence interval."""
    t = _T[min(len(values) - 1, len(_T)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def gap(pairs: Sequence[float], mean: float) -> tuple[str, bool]:
    """A paired difference of shares in points with its 95 % interval; whether chance does as much.

    Args:
        pairs: One difference for each seed; of a single one nothing is known about chance.
        mean: The difference that is shown.
    """
    if len(pairs) < 2:
        return points(mean, 2, ""), True
    half = confidence(pairs)[1]
    text = f"{points(mean, 2, '')} ± {100 * half:.2f}"
    chance = abs(statistics.fmean(pairs)) <= half
    return Rounded(text, 100 * mean, 100 * half, unit="points"), chance


def tested(tests: int | None) -> str:
    """` · 359 test images`, after a table's title; "" if that is not known."""
    return f" · {count(tests, 'test image')}" if tests else ""


def counted(share: float | None, total: float | None) -> str:
    """`85.2–91.5, n 359`: Wilson's 95 % interval of a share that was counted; "" if not known."""
    if share is None or not known(share) or not total:
        return ""
    spread = 1.96**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = 1.96 * math.sqrt(share * (1 - share) / total + spread / 4 / total) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{100 * low:.1f}{DASH}{100 * high:.1f}, n {total:,.0f}"


def human_bytes(size: float | None) -> str:
    """`1.2 MB` (powers of 1,000, as network traffic is counted)."""
    if size is None:
        return DASH
    unit, scale = byte_unit(size)
    digits = {"B": 0, "GB": 2}.get(unit, 1)
    return Rounded(f"{size / scale:.{digits}f} {unit}" if size else "0", size, unit="bytes")


def byte_unit(size: float) -> tuple[str, float]:
    """The unit in which `size` bytes read well, and its bytes (powers of 1,000)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return unit, scale
    return "B", 1.0


def metric(value: float | None, unit: str = "") -> str:
    """`2.51 M`, `780 J`, `1.30 kJ`: three digits and a power of 1,000, or a dash."""
    if value is None or not known(value):
        return DASH
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)):
        if value >= scale or not prefix:
            shown = value / scale
            digits = 0 if shown >= 100 else 1 if shown >= 10 else 2
            if not prefix and not unit:
                digits = 0
            return Rounded(f"{shown:.{digits}f} {prefix}{unit}".rstrip(), value, unit=unit)
    raise AssertionError("the last scale fits all")


def bar(value: float | None) -> str:
    """A share as a CSS width."""
    return "0" if value is None or not known(value) else f"{100 * value:.2f}%"


def count(number: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float | None) -> str:
    """`0.4 s`, `90 s`, `12 min`, `2 h 05 min`, or a dash."""
    if seconds is None:
        return DASH
    minutes = round(seconds / 60)
    if seconds < 120:
        text = f"{seconds:.{1 if seconds < 10 else 0}f} s"
    else:
        text = f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
    return Rounded(text, seconds, unit="s")


def seeds(numbers: Sequence[int]) -> str:
    """`seed 0`, `3 seeds`."""
    return f"seed {numbers[0]}" if len(numbers) == 1 else count(len(numbers), "seed")


def objective(terms: Iterable[tuple[str, float]]) -> str:
    """`ce + 0.5 × kd` from names and weights."""
    return " + ".join(
        name if weight == 1 else f"{weight:g} {TIMES} {name}" for name, weight in terms
    )


def short(name: str, length: int = 16) -> str:
    """A name that fits beside a figure."""
    return name if len(name) <= length else name[: length - 1] + "…"


def date(folder: Path) -> str:
    """When a run or study was created: its name contains it, else its config's age."""
    match = re.search(r"-(\d{8}-\d{6})-[0-9a-f]{4}$", folder.name)
    if match:
        moment = time.strptime(match[1], "%Y%m%d-%H%M%S")
    else:
        moment = time.localtime((folder / "config.yaml").stat().st_mtime)
    return time.strftime("%Y-%m-%d %H:%M", moment)


def as_float(value: Any) -> float:
    """Not a number for what is not known."""
    return float("nan") if value is None else float(value)


def finite(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [float(value) for value in values if value is not None and known(value)]
