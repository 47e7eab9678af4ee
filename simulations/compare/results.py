"""What a comparison comes to: means and deviations over seeds, and the same as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkd.reporting.table import write_csv
from fedkd.simulations.compare.entries import Entry
from fedkd.studies.engine import Record, spread

NUMBERS = ("final", "best", "worst_client", "ece", "up", "down", "transfer", "seconds", "joules",
           "multiply_adds", "teachers", "spent")  # fmt: skip
_COLUMNS = ("final", "best", "best_round", "worst_client", "ece", "up", "down", "transfer",
            "seconds", "joules", "multiply_adds", "teachers", "spent")  # fmt: skip
_ROUND = ("accuracy", "ece", "up", "down", "seconds")


Results = Mapping[tuple[str, Any], Record]
"""(Row's name, seed or a word for it) -> what came out."""


def results(entries: Sequence[Entry], found: Results) -> Record:
    """Everything the table, the pictures and the report show, from what is there."""
    done = list(found.values())
    return {
        "factors": list(entries[0].choices),
        "classes": done[0]["classes"] if done else [],
        "rows": {entry.name: _row(entry, found) for entry in entries},
    }


def _row(entry: Entry, found: Results) -> Record:
    done = {seed: record for (name, seed), record in found.items() if name == entry.name}
    tables = [record["per_class"] for record in done.values()]
    return {
        "kind": entry.kind,
        "about": entry.about,
        "choices": dict(entry.choices),
        "has_student": all(record["has_student"] for record in done.values()),
        **{key: spread([record.get(key) for record in done.values()]) for key in NUMBERS},
        "per_class": [_mean(column) for column in zip(*tables, strict=True)],
        "seeds": {str(seed): record for seed, record in done.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = spread(values)
    return None if known is None else known["mean"]


def write_tables(folder: Path, found: Record) -> None:
    """Write `results.csv`, a line per row and seed, and `rounds.csv`, a line per round.

    Accuracies and ECE are shares, bytes sums over all clients (of one round in `rounds.csv`).
    """
    factors = found["factors"]
    head = ["name", "kind", *factors, "seed"]
    lines: list[list[object]] = [[*head, *_COLUMNS, "error"]]
    rounds: list[list[object]] = [[*head, "round", *_ROUND]]
    for name, row in found["rows"].items():
        start = [name, row["kind"], *(row["choices"][factor] for factor in factors)]
        for seed in dict.fromkeys([*map(str, found["seeds"]), *row["seeds"]]):
            record = row["seeds"].get(seed)
            error = found["errors"].get(f"{name}, seed {seed}")
            if record is None and error is None:
                continue
            numbers = record or {}
            lines.append([*start, seed, *(numbers.get(key) for key in _COLUMNS), error])
            for each in numbers.get("rounds", ()):
                rounds.append([*start, seed, each["round"], *(each[key] for key in _ROUND)])
    for file, table in (("results.csv", lines), ("rounds.csv", rounds)):
        write_csv(folder / file, table)
