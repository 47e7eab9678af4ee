"""The tables of a run, for its page and for the console."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fedkd.io.text import ranges
from fedkd.reporting.costs import costs_table, run_lines
from fedkd.reporting.domain_table import alone
from fedkd.reporting.format import (
    count,
    counted,
    duration,
    finite,
    human_bytes,
    number,
    percent,
    tested,
)
from fedkd.reporting.heads import Answering, heads_table
from fedkd.reporting.run_record import Found
from fedkd.reporting.table import Cell, Column, Row, Table, numbers, plain, words
from fedkd.runs.events import ClientEvaluated, ReplyRefused
from fedkd.runs.privacy_statement import statement
from fedkd.training.detection import Detection

_OF_CLIENTS = ("train", "keys", "masked", "knowledge", "evaluate")
_BAR = Column("", look="narrow", on="page")


def console_tables(found: Found) -> list[Table]:
    """What the console shows of a run that has a summary."""
    refused = [refused_table(found.refused)] if found.refused else []
    promised = [promise_table(found)] if statement(found.run) is not None else []
    tables = [detection_table(found, clients=clients) for clients in (False, True)]
    uneven = [table for table in tables if table is not None]
    costs = found.summary.get("costs")
    spent = [] if costs is None else [costs_table(run_lines(costs), costs.get("energy"))]
    return [
        results_table(found),
        *([table] if (table := heads_of(found)) is not None else []),
        *([modalities_table(found)] if found.run.experiment.data.transfer.pairs else []),
        teachers_table(found),
        *uneven,
        *promised,
        traffic_table(found),
        time_table(found),
        *spent,
        *refused,
    ]


def results_table(found: Found) -> Table:
    """Who learned from what, and how good it is."""
    experiment, summary, last = found.run.experiment, found.summary, found.last
    model, size = experiment.student.model.name, found.transfer["size"]
    best = summary.get("student", {})
    rows: list[Row] = []

    def add(key: str, name: str, source: str, value: float | None, *, note: str = "",
            of: float | None = found.tested) -> None:  # fmt: skip
        strong = key == "student"
        cells: list[str | Cell] = [Cell(name, note, strong), note, source]
        cells += [Cell(percent(value), counted(value, of), strong), Cell("", bar=value or math.nan)]
        rows.append(Row(cells, key, begins=key in ("ensemble", "oracle")))

    parameters = count(best["parameters"], "parameter") if "parameters" in best else ""
    teachers = len(found.clients) + len(experiment.teachers.server)
    source = f"{count(teachers, 'teacher')} on {count(size, 'transfer image')}"
    note = ", ".join(filter(None, (model, parameters)))
    if kept := summary.get("kept"):
        images = count(kept["images"], "validation image")
        source += f"; after round {kept['round']}, the best on {images}"
    add("student", "student", source, found.accuracy("student"), note=note)
    if best.get("best_accuracy", 0) > best.get("accuracy", math.inf):
        source = f"the same, after round {best['best_round']}"
        add("minor", "student at its best", source, best["best_accuracy"])
    if "ensemble" in found.scores:
        add("ensemble", "ensemble", "all teachers, fused", found.accuracy("ensemble"))
    known = finite(last.teachers.values() if last else ())
    if known:
        add("teacher", "best teacher", "its own private images", max(known))
        add("teacher", "median teacher", "its own private images", statistics.median(known))
    for model, value in _server_teachers(found):
        add("teacher", "teacher of the server", f"a file, as {model}", value)
    if last and last.pseudo_labels is not None:
        source = "ensemble on the transfer set, against its hidden labels"
        add("pseudo", "pseudo-labels", source, last.pseudo_labels, of=size)
    if summary.get("oracle") is not None:
        source = f"{count(size, 'transfer image')} with true labels"
        add("oracle", "oracle", source, summary["oracle"], note=model)
    if summary.get("ceiling") is not None:
        total = "" if found.class_counts is None else f"{int(found.class_counts.sum()):,} "
        source = f"all {total}private images in one place"
        add("ceiling", "ceiling", source, summary["ceiling"], note=model)
    if found.holdouts:
        client = min(found.holdouts, key=lambda c: (found.holdouts[c], c))
        source = f"student on the held-out images of client {client}"
        add("worst", "worst client", source, found.holdouts[client], of=found.held_out[client])
    size = tested(summary.get("test", {}).get("size"))
    columns = [
        Column("who", look="name"), Column("model", on="console"),
        Column("learnt from", look="soft narrow"), *numbers("accuracy"), _BAR,
    ]  # fmt: skip
    return Table(columns, rows, f"{experiment.name} · seed {experiment.seed}{size}")


def heads_of(found: Found) -> Table | None:
    """How good each head of student, ensemble and teachers is; None where there is a single one."""
    if found.last is None or not found.last.heads:
        return None
    seen = found.last.heads
    who = [("student", "student", "student"), ("ensemble", "ensemble", "ensemble")]
    who += [(str(client), f"teacher {client}", "teacher") for client in found.listed]
    rows = [
        Answering(name, "", {head: alone(value) for head, value in seen[which].items()}, key)
        for which, name, key in who
        if which in seen
    ]
    return heads_table(list(found.run.experiment.student.heads), rows)


def detection_table(found: Found, *, clients: bool) -> Table | None:
    """How well classes are found where they are uneven; None where that is not measured.

    Args:
        found: The run.
        clients: Of each teacher, and of the student at each client; else of student and ensemble.
    """
    if found.last is None or not found.last.detection:
        return None
    seen = found.last.detection
    rows: list[Row] = []

    def add(who: str, about: str, values: Detection | ClientEvaluated, key: str = "") -> None:
        shares = values.balanced_accuracy, values.auc, values.sensitivity
        first = Cell(who, about, key == "student")
        rows.append(Row([first, *(percent(share) for share in shares)], key))

    for who in () if clients else ("student", "ensemble"):
        if who in seen:
            add(who, "test images", seen[who], who)
    for client in found.listed if clients else ():
        if str(client) in seen:
            add(f"teacher {client}", "test images", seen[str(client)])
    for event in found.run.events(ClientEvaluated) if clients else ():
        if event.balanced_accuracy is not None and event.client in found.listed:
            about = f"its {count(round(event.holdout_total), 'held-out image')}"
            add(f"student at client {event.client}", about, event)
    columns = [Column("", look="name"), *numbers("balanced accuracy", "AUC", "sensitivity")]
    note = "sensitivity where 95 % of the others are left alone"
    return Table(columns, rows, "uneven classes", note) if rows else None


def teachers_table(found: Found) -> Table:
    """One row for each teacher."""
    counts, last, wrong = found.class_counts, found.last, found.wrong_labels
    noise = [] if wrong is None else numbers("wrong labels")
    columns = [
        *words("client", "model"), *numbers("images", "classes"), *noise,
        *numbers("teacher, test"), _BAR,
        *numbers("weight"), _BAR, *numbers("student, held-out"), _BAR,
    ]  # fmt: skip
    rows = []
    for client in found.listed:
        held = None if counts is None or client >= len(counts) else counts[client]
        cells: list[str | Cell] = [
            str(client),
            found.run.experiment.teachers.model_of(client).name,
            number(None if held is None else held.sum()),
            number(None if held is None else (held > 0).sum()),
        ]
        cells += [] if wrong is None else [percent(wrong[client])]
        for scores, of in (
            (found.teachers, found.tested),
            (last and last.weights, None),
            (found.holdouts, found.held_out.get(client)),
        ):
            value = scores.get(client) if scores else None
            cells += [Cell(percent(value), counted(value, of))]
            cells += [Cell("", bar=math.nan if value is None else value)]
        rows.append(Row(cells))
    blank = ["", ""] + ([] if wrong is None else [""])
    weights = last.server_weights if last else []
    for place, (model, value) in enumerate(_server_teachers(found)):
        cells = ["server", model, *blank, percent(value), Cell("", bar=value)]
        weight = weights[place] if weights else None
        cells += [percent(weight), Cell("", bar=math.nan if weight is None else weight)]
        rows.append(Row([*cells, "", Cell("", bar=math.nan)]))
    return Table(columns, rows, "teachers")


def _server_teachers(found: Found) -> list[tuple[str, float]]:
    """Model of each of the server's own teachers, and its accuracy on the test images."""
    models = found.run.experiment.teachers.server
    known = found.last.server_teachers if found.last else []
    return [(model.name, value) for model, value in zip(models, known)]


def modalities_table(found: Found) -> Table:
    """One row for each modality: who sees it, and how good its teachers are."""
    experiment, last, counts = found.run.experiment, found.last, found.class_counts
    columns = [
        *words("modality", "clients", "the student"), *numbers("images"),
        *numbers("teachers, test", "worst", "best", "weight"), _BAR,
    ]  # fmt: skip
    rows = []
    for name in experiment.data.transfer.pairs:
        clients = [client for client, seen in enumerate(experiment.modalities) if seen == name]
        known = finite(found.teachers.get(client) for client in clients)
        held = None if counts is None or not clients else int(counts[clients].sum())
        weights = last.weights if last else {}
        share = sum(weights.get(client, 0.0) for client in clients) if weights else None
        sees = name in experiment.student.modality
        cells: list[str | Cell] = [
            Cell(name, strong=True), ranges(clients) or "none", "sees it" if sees else "",
            number(held), percent(statistics.fmean(known) if known else None),
            percent(min(known, default=None)), percent(max(known, default=None)), percent(share),
            Cell("", bar=math.nan if share is None else share),
        ]  # fmt: skip
        rows.append(Row(cells))
    return Table(columns, rows, "modalities")


def traffic_table(found: Found) -> Table:
    """Bytes per phase, all clients and rounds."""
    phases: dict[str, list[int]] = {}
    for message in found.messages:
        total = phases.setdefault(message.phase, [0, 0])
        total[0] += message.down
        total[1] += message.up
    rows = [
        Row([Cell(phase, "measurement" if phase == "evaluate" else ""), *map(human_bytes, sizes)])
        for phase, sizes in phases.items()
    ]
    totals = [sum(sizes) for sizes in zip(*phases.values(), strict=True)]
    rows.append(Row(["total", *map(human_bytes, totals)], look="total", begins=True))
    each = found.transfer["bytes"]
    shipping = f"shipping the transfer set: {human_bytes(each)} to each client" if each else ""
    header = [*words("phase"), *numbers("to clients", "from clients")]
    return Table(header, rows, "bytes, all clients and rounds", shipping)


def clients_table(found: Found) -> Table:
    """Bytes per client and phase."""
    clients: dict[int, dict[str, int]] = {}
    for message in found.messages:
        # When nodes describe themselves it is not known which clients they are.
        if message.client is not None and message.phase != "describe":
            row = clients.setdefault(message.client, {})
            for key, size in (("↓", message.down), ("↑", message.up)):
                for name in (f"{message.phase} {key}", f"all {key}"):
                    row[name] = row.get(name, 0) + size
    seen, shown = {message.phase for message in found.messages}, set(found.listed)
    phases = [phase for phase in _OF_CLIENTS if phase in seen]
    ways = [f"{phase} {way}" for phase in (*phases, "all") for way in ("↓", "↑")]
    rows = [
        [str(client), *(human_bytes(row.get(way, 0)) for way in ways)]
        for client, row in sorted(clients.items())
        if client in shown
    ]
    return plain([*words("client"), *numbers(*ways)], rows)


def time_table(found: Found) -> Table:
    """Seconds per phase."""
    rows = [Row([phase, duration(spent)]) for phase, spent in found.seconds.items()]
    total = Row(["total", duration(sum(found.seconds.values()))], look="total", begins=True)
    return Table([*words("phase"), *numbers("time")], [*rows, total], "time")


def refused_table(refused: Sequence[ReplyRefused]) -> Table:
    """Who was left out of which round, and why."""
    columns = [*numbers("round"), *words("phase"), *numbers("client"), Column("reason")]
    rows = [(number(r.round), r.phase, number(r.client), r.reason) for r in refused]
    return Table(columns, [Row(row) for row in rows], "left out")


def promise_table(found: Found) -> Table:
    """What is promised, to whom and how; no heading."""
    facts = statement(found.run)
    assert facts is not None
    delta = f", delta {facts['delta']:.0e}" if facts["delta"] else ""
    promised = f"epsilon {facts['budget']:.4g} per client for the whole run{delta}"
    rows = {
        "protected": facts["protects"],
        "against": facts["against"],
        "assumed": facts["assumes"],
        "promised": promised,
        "spent": f"epsilon {facts['worst']:.4g} by the worst client",
        "in words": in_words(facts["worst"], facts["delta"]),
        "how": f"{facts['mechanism']}: {facts['how']}",
    }
    header = [Column("", look="soft name"), Column("")]
    return Table(header, [Row(row) for row in rows.items()], "privacy")


def in_words(epsilon: float, delta: float) -> str:
    """What an epsilon means for who guesses: the success of the best test (Kairouz et al. 2015)."""
    # (e^epsilon + delta) / (e^epsilon + 1), where e^epsilon may be too large for a float.
    right = (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))
    return (
        "of two equally likely possibilities, somebody who knows everything else and sees all that "
        f"left guesses the right one in at most {100 * min(right, 1):.4g} of 100 cases"
    )


def spent_table(found: Found) -> Table:
    """What clients have spent; those of the same fate are in one row."""
    facts = statement(found.run)
    assert facts is not None
    fates: dict[tuple[float, tuple[int, ...]], list[str]] = {}
    for client, mine in facts["clients"].items():
        fates.setdefault((mine["epsilon"], tuple(mine["frozen_in"])), []).append(client)
    rows = [
        [
            ", ".join(who) if len(who) < len(facts["clients"]) else f"all {len(who)}",
            f"{epsilon:.4g}",
            percent(epsilon / facts["budget"]),
            ", ".join(map(str, frozen)) or "none",
        ]
        for (epsilon, frozen), who in fates.items()
    ]
    last = "rounds without training: budget spent"
    columns = [*words("clients"), *numbers("epsilon spent", "of the budget"), *words(last)]
    return plain(columns, rows)
