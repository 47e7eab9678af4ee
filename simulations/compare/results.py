"""What a comparison comes to: means and deviations over seeds, and the same as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from fedkd.io.text import cell
from fedkd.knowledge.store import write_atomically
from simulations.compare.entries import Entry
from simulations.compare.folder import CompareFolder, Record

NUMBERS = ("final", "best", "worst_client", "ece", "up", "down", "transfer", "seconds", "teachers",
           "spent")  # fmt: skip
_COLUMNS = ("final", "best", "best_round", "worst_client", "ece", "up", "down", "transfer",
            "seconds", "teachers", "spent")  # fmt: skip
_ROUND = ("accuracy", "ece", "up", "down", "seconds")


def results(folder: CompareFolder) -> Record:
    """Everything the table, the pictures and the report show, from what is there."""
    config = folder.config
    rows = {entry.name: _row(folder, entry) for entry in folder.entries}
    finished = all(len(row["seeds"]) == len(config.seeds) for row in rows.values())
    done = [record for row in rows.values() for record in row["seeds"].values()]
    return {
        "name": config.name,
        "sort": type(config).__name__.lower(),
        "factors": list(folder.entries[0].choices),
        "seeds": list(config.seeds),
        "classes": done[0]["classes"] if done else [],
        "finished": finished,
        "rows": rows,
    }


def _row(folder: CompareFolder, entry: Entry) -> Record:
    found = {seed: folder.result(entry, seed) for seed in folder.config.seeds}
    done = {seed: r for seed, r in found.items() if r is not None and "error" not in r}
    tables = [record["per_class"] for record in done.values()]
    return {
        "kind": entry.kind,
        "about": entry.about,
        "choices": dict(entry.choices),
        "has_student": all(record["has_student"] for record in done.values()),
        **{key: spread([record.get(key) for record in done.values()]) for key in NUMBERS},
        "per_class": [_mean(column) for column in zip(*tables, strict=True)],
        "seeds": {str(seed): record for seed, record in done.items()},
        "errors": {
            str(seed): record["error"]
            for seed, record in found.items()
            if record is not None and "error" in record
        },
    }


def spread(values: Sequence[float | None]) -> Record | None:
    """Mean and sample deviation of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, "n": len(known)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = spread(values)
    return None if known is None else known["mean"]


def write_tables(folder: CompareFolder, found: Record) -> None:
    """Write `results.csv`, a line per row and seed, and `rounds.csv`, a line per round.

    Accuracies and ECE are shares, bytes sums over all clients (of one round in `rounds.csv`).
    """
    factors = found["factors"]
    head = ["name", "kind", *factors, "seed"]
    lines: list[list[object]] = [[*head, *_COLUMNS, "error"]]
    rounds: list[list[object]] = [[*head, "round", *_ROUND]]
    for name, row in found["rows"].items():
        start = [name, row["kind"], *(row["choices"][factor] for factor in factors)]
        for seed in found["seeds"]:
            record = row["seeds"].get(str(seed))
            error = row["errors"].get(str(seed))
            if record is None and error is None:
                continue
            told = record or {}
            lines.append([*start, seed, *(told.get(key) for key in _COLUMNS), error])
            for each in told.get("rounds", ()):
                rounds.append([*start, seed, each["round"], *(each[key] for key in _ROUND)])
    for file, table in (("results.csv", lines), ("rounds.csv", rounds)):
        write_atomically(folder.path / file, _csv(table))


def _csv(table: Sequence[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([cell(each) for each in row] for row in table)
    return buffer.getvalue().encode()
