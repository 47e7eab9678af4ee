"""The file of values: machine -> name -> value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("hashes.json")
Values = Mapping[str, str]


def expected(machine: str) -> dict[str, str]:
    """Values of a machine; empty if nobody has written any."""
    return _read().get(machine, {})


def differences(path: str, kept: Values, found: Values) -> list[str]:
    """One line per value of a path that is not what it was, or that came or went."""
    mine = {name: value for name, value in kept.items() if name.startswith(f"{path}: ")}
    lines = []
    for name in sorted(mine.keys() | found.keys()):
        old, new = mine.get(name, "nothing"), found.get(name, "nothing")
        if kept and old != new:
            lines.append(f"{name}: expected {old}, found {new}")
    return lines


def write(machine: str, path: str, found: Values) -> None:
    """Keep a path's values; those that moved here cannot be right elsewhere, and go there."""
    kept = _read()
    before = kept.setdefault(machine, {})
    moved = {
        n for n, value in before.items() if n.startswith(f"{path}: ") and found.get(n) != value
    }
    for values in kept.values():
        for name in moved:
            values.pop(name, None)
    before.update(found)
    text = json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")


def _read() -> dict[str, dict[str, str]]:
    if not FILE.is_file():
        return {}
    kept: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return kept
