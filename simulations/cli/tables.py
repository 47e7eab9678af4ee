"""The tables that the command line ends with."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedkd.reporting.table import Table as Shown
from simulations.cli.live import percent


def summary_table(summary: dict[str, Any]) -> RenderableType:
    """Accuracies, bytes and seconds of a finished run."""
    student, teachers = summary["student"], summary["teachers"]
    title = f"{summary['name']} · seed {summary['seed']}"
    if "test" in summary:  # not in runs of older versions
        title += f" · {summary['test']['size']:,} test images"
    results = Table(title=title, title_justify="left")
    results.add_column("network")
    results.add_column("model")
    results.add_column("learnt from")
    results.add_column("test accuracy", justify="right")
    results.add_row(
        "[bold]student[/]",
        f"{student['model']} ({student['parameters']:,})",
        f"knowledge of {len(teachers)} teachers",
        f"[bold]{percent(student['accuracy'])}[/]",
    )
    if student["best_accuracy"] > student["accuracy"]:
        best = f"best round was {student['best_round']}"
        results.add_row("", "", best, percent(student["best_accuracy"]))
    results.add_section()
    for teacher in teachers:
        results.add_row(
            f"teacher {teacher['client']}",
            teacher["model"],
            "private images"
            if teacher["examples"] is None
            else f"{teacher['examples']:,} private images",
            percent(teacher["accuracy"]),
        )
    known = [t["accuracy"] for t in teachers if t["accuracy"] is not None]
    if known:
        results.add_row("", "", "best teacher", percent(max(known)))
        results.add_row("", "", "median teacher", percent(statistics.median(known)))
    results.add_section()
    transfer = summary["transfer"]
    if summary.get("ensemble"):
        accuracy = summary["ensemble"]["accuracy"]
        results.add_row("teacher ensemble", "", "all teachers, fused", percent(accuracy))
    if "oracle" in summary:
        results.add_row(
            "oracle", student["model"],
            f"{transfer['size']:,} transfer images, true labels", percent(summary["oracle"]),
        )  # fmt: skip
    if "ceiling" in summary:
        total = sum(t["examples"] for t in teachers)
        results.add_row(
            "ceiling", student["model"],
            f"all {total:,} private images in one place", percent(summary["ceiling"]),
        )  # fmt: skip
    if summary.get("worst_client") is not None:
        results.add_row(
            "worst client", "", "student on a client's own images", percent(summary["worst_client"])
        )

    privacy = summary.get("privacy")
    if privacy is not None:
        budget = f"epsilon {privacy['worst']:.3g} of {privacy['budget']:.3g}"
        note = f"delta {privacy['delta']:.0e}, worst client; what it covers: report"
        results.add_section()
        results.add_row("privacy", privacy["mechanism"], note, budget)

    traffic = Table(title="bytes, all clients and rounds", title_justify="left")
    for title, side in (("phase", "left"), ("to clients", "right"), ("from clients", "right")):
        traffic.add_column(title, justify=side)  # type: ignore[arg-type]
    for phase, size in summary["bytes"].items():
        traffic.add_row(phase, human_bytes(size["down"]), human_bytes(size["up"]))
    totals = {way: sum(size[way] for size in summary["bytes"].values()) for way in ("down", "up")}
    traffic.add_section()
    traffic.add_row("total", human_bytes(totals["down"]), human_bytes(totals["up"]))
    traffic.add_row("shipping the transfer set", human_bytes(transfer["bytes"]) + " each", "")

    times = Table(title="time", title_justify="left")
    times.add_column("phase")
    times.add_column("seconds", justify="right")
    for phase, seconds in summary["seconds"].items():
        if phase == "total":
            times.add_section()
        times.add_row(phase, f"{seconds:.1f}")
    side_by_side = Table.grid(padding=(0, 4))
    side_by_side.add_row(traffic, times)
    parts: list[RenderableType] = [results, side_by_side]
    if summary["refused"]:
        parts.append(refused_table(summary["refused"]))
    if summary["degraded_rounds"]:
        rounds = ", ".join(map(str, summary["degraded_rounds"]))
        parts.append(
            Text(f"no quorum in round {rounds}: the student did not learn there", "yellow")
        )
    return Group(*parts)


def console_table(table: Shown) -> RenderableType:
    """A table of `fedkd.reporting` as the console shows it."""
    drawn = Table(title=table.title or None, title_justify="left")
    for column in table.columns_on("console"):
        aligned: Any = {"justify": "right", "no_wrap": True} if column.number else {}
        drawn.add_column(Text(column.title), overflow="fold", **aligned)
    for row in table.rows:
        if row.begins:
            drawn.add_section()
        bold = row.look in ("strong", "total")
        cells = [
            Text(cell.text, "bold" if cell.strong or bold else "")
            for _, cell in table.cells_on("console", row)
        ]
        drawn.add_row(*cells, style="dim" if row.look == "soft" else None)
    return Group(drawn, Text(table.note, "dim")) if table.note else drawn


def refused_table(refused: list[dict[str, Any]]) -> Table:
    """Who was left out of which round, and why."""
    table = Table(title="left out", title_justify="left")
    table.add_column("round", justify="right")
    table.add_column("phase")
    table.add_column("client", justify="right")
    table.add_column("reason", overflow="fold")
    for record in refused:
        client = record["client"]
        shown = "–" if client is None else str(client)
        table.add_row(str(record["round"]), record["phase"], shown, Text(record["reason"]))
    return table


def partition_table(counts: Any, classes: tuple[str, ...]) -> Table:
    """Images per client (rows) and class (columns)."""
    table = Table(title="private images per client and class", title_justify="left")
    table.add_column("client", justify="right")
    shown = min(len(classes), 20)
    for name in classes[:shown]:
        # As text: a class may be called [red].
        table.add_column(Text(name), justify="right", max_width=9, overflow="ellipsis")
    if shown < len(classes):
        table.add_column("…")
    table.add_column("classes", justify="right")
    table.add_column("total", justify="right")
    for client, row in enumerate(counts.tolist()):
        cells = [str(n) if n else "[dim]·[/]" for n in row[:shown]]
        cells += [""] * (shown < len(classes))
        table.add_row(str(client), *cells, str(sum(n > 0 for n in row)), f"{sum(row):,}")
    return table


def human_bytes(size: float) -> str:
    """`1.2 MB` (powers of 1,000, as network traffic is counted)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
