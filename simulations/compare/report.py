"""Comparisons, ablations and sweeps as a page and a table; also of those under way."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.io.records import read_json
from fedkd.reporting import page
from fedkd.reporting.format import (
    DASH,
    count,
    date,
    gap,
    human_bytes,
    metric,
    number,
    seeds,
    spread,
    tested,
)
from fedkd.reporting.page import Card, Page, Section, size_tile
from fedkd.reporting.table import Cell, Column, Row, Table
from fedkd.simulations.compare import figures
from fedkd.simulations.compare.config import Comparison, SideBySideConfig
from fedkd.simulations.compare.effects import main_effects, two_way
from fedkd.simulations.compare.grid import EXPERIMENT, Ablation
from fedkd.simulations.compare.sweep import Sweep, budget
from fedkd.studies.engine import REPORT, Record

# Key of a result, title, whether a high number is a good one (None: neither), console too.
_COLUMNS: tuple[tuple[str, str, bool | None, bool], ...] = (
    ("final", "last round, %", True, True),
    ("best", "best round, %", None, False),
    ("worst_client", "worst client, %", True, True),
    ("ece", "ECE, %", False, False),
    ("up", "bytes up", None, True),
    ("down", "bytes down", None, True),
    ("transfer", "transfer set", None, False),
    ("seconds", "seconds", None, True),
    ("joules", "energy", False, False),
    ("multiply_adds", "mult-adds", None, False),
)
_SWEPT: tuple[tuple[str, str, bool | None, bool], ...] = (
    ("final", "student, %", True, True),
    ("teachers", "teachers, %", None, True),
    ("spent", "epsilon spent", None, True),
    ("noise", "noise / signal, %", None, True),
    ("ece", "ECE, %", False, False),
    ("up", "bytes up", None, False),
    ("down", "bytes down", None, False),
    ("seconds", "seconds", None, True),
)
_CAPTION = (
    "Test accuracy in percent, mean ± sample standard deviation over seeds. To the first: paired "
    "by seed, with its 95 % interval (Student's t); pale where chance does as much. The last round "
    "involves no choice; the best round is chosen on the test set and flatters. Worst client: the "
    "final model on the client's held-out private images where it does worst. ECE: expected "
    "calibration error in percent, lower is better. Bytes: messages as Flower serialises them, "
    "summed over clients and rounds, without those that only measure. Transfer set: its images as "
    "uint8, sent to each client once, if clients do not have them; not in the other columns. "
    "Seconds: all of it one after the other in one process; teachers that several rows share "
    "count for each. Energy: assumed, seconds × resources.energy.watts. Mult-adds: of the student, "
    "for one image; shown where students differ."
)
_CAPTION_SWEPT = (
    "Test accuracy in percent, mean ± sample standard deviation over seeds (of a release: over "
    "draws of its noise, too), after the last round. Teachers: mean over clients, where their "
    "answers about test images are covered by the promise. Epsilon spent: of the worst client, by "
    "the run's ledger; nothing is promised at inf. Noise / signal: the noise's deviation over the "
    "most that the noisy sum can come to (an expected batch of clipped gradients, the votes of all "
    "clients). Seconds: one process, all clients one after the other. Noise is fresh in every run."
)


def write_report(config: SideBySideConfig, folder: Path, found: Record) -> Path:
    """Write `report.html` and return its path."""
    return page.write(folder / REPORT, make_page(config, folder, found))


def make_page(config: SideBySideConfig, folder: Path, found: Record) -> Page:
    """Everything on the page."""
    if isinstance(config, Sweep):
        sections = [_sweep(config, found)]
    elif isinstance(config, Ablation):
        sections = _ablation(config, found)
    else:
        sections = _comparison(found)
    # What sends nothing is a bound, not a federated method.
    best = [name for name in ranked(found) if found["rows"][name]["up"]["mean"] > 0][:1]
    total = len(found["seeds"]) * len(found["rows"])
    if isinstance(config, Sweep):  # the noise of a release is drawn several times
        drawn = sum(entry.experiment.release is not None for entry in config.entries())
        total += len(found["seeds"]) * drawn * (config.draws - 1)
    done = sum(len(row["seeds"]) for row in found["rows"].values())
    versions = read_json(folder / "versions.json", dict[str, str])
    return Page(
        title=found["name"],
        sentence=_sentence(config, found),
        sections=[*sections, page.config_section(folder, versions, found["study"])],
        footer=folder.name,
        remarks=[seeds(found["seeds"]), date(folder)],
        tiles=size_tile(found["tests"], found["rows"][best[0]]["final"]["mean"] if best else None),
        headline=_headline(found, best[0]) if best and not found["factors"] else None,
        **page.progress(found, f"{done} of {count(total, 'result')}"),
    )


def _headline(found: Record, best: str) -> tuple[str, str]:
    """The best method's accuracy, and how far the next one is behind it."""
    rows = found["rows"]
    own = rows[best]
    text = f"{best}, last round, {seeds([*map(int, own['seeds'])])}"
    for name in ranked(found):
        if name != best and rows[name]["up"]["mean"] > 0:
            gap, chance = _gap(own, rows[name])
            return f"{shown('final', own['final'])} %", f"{text} · {gap} to {name}" + (
                ", within noise" if chance else ""
            )
    return f"{shown('final', own['final'])} %", text


def _gap(row: Record, other: Record) -> tuple[str, bool]:
    """A row's final accuracy less another's, paired by seed; whether chance does as much."""
    both = [seed for seed in row["seeds"] if seed in other["seeds"]]
    pairs = [row["seeds"][seed]["final"] - other["seeds"][seed]["final"] for seed in both]
    return gap(pairs, row["final"]["mean"] - other["final"]["mean"])


def ranked(found: Record) -> list[str]:
    """Names of rows with a result, best first."""
    known = {name: row for name, row in found["rows"].items() if row["final"] is not None}
    return sorted(known, key=lambda name: -known[name]["final"]["mean"])


def shown(key: str, value: Mapping[str, Any] | None) -> str:
    """A mean and its deviation as the tables write it; a dash for what is not known."""
    if value is None:
        return DASH
    mean = value["mean"]
    if key in ("up", "down", "transfer"):
        return human_bytes(mean)
    if key == "spent":
        return number(mean, ".3g")
    if key == "noise":
        return number(100 * mean, ".1f" if mean < 1 else ",.0f")
    if key in ("joules", "multiply_adds"):
        return metric(mean, "J" if key == "joules" else "")
    if key == "seconds":
        return number(mean, ".1f" if mean < 100 else ",.0f")
    return spread(value, 1 if key == "worst_client" else 2)


def _sentence(config: SideBySideConfig, found: Record) -> str:
    data, rounds, rows = config.experiment.data, config.experiment.rounds, len(found["rows"])
    what, shared = f"{count(rows, 'cell')} of {' × '.join(found['factors'])}", "All cells of a seed"
    shared += " share what is not changed."
    if isinstance(config, Comparison):
        what = count(rows, "method")
        shared = "The same split, seed, initial networks and local training for all."
    if isinstance(config, Ablation) and config.experiments:
        return f"{what} on {', '.join(config.experiments)}. {shared}"
    counts = sorted({entry.experiment.clients for entry in config.entries()})
    alpha = data.partition.options.get("alpha")
    partition = data.partition.name + " partition" + ("" if alpha is None else f" (alpha {alpha})")
    return (
        f"{what} on {data.dataset.name}, {' or '.join(map(str, counts))} clients, {partition}, "
        f"{count(data.transfer.size, 'transfer image')}, {count(rounds, 'round')}. {shared}"
    )


def result_table(
    found: Record, names: Iterable[str] = (), factors: Sequence[str] | None = None
) -> Table:
    """Rows with their means over seeds; the best mean of a column stands out.

    Args:
        found: The results.
        names: Rows that are shown; default: all, best first (of a sweep, in its own order).
        factors: Columns with what a row has chosen; default: all factors.
    """
    swept = found["study"] == "privacy sweep"
    factors = found["factors"] if factors is None else factors
    ranking = list(found["rows"]) if swept else ranked(found)
    missing = [name for name in found["rows"] if name not in ranking]
    rows = {name: found["rows"][name] for name in names or [*ranking, *missing]}
    columns = [c for c in (_SWEPT if swept else _COLUMNS) if _tells(c[0], rows.values())]
    first = next((name for name in rows if not swept and rows[name]["final"] is not None), None)
    gaps: dict[str, tuple[str, bool]] = {}
    if first is not None:
        gaps = {
            name: _gap(row, rows[first])
            for name, row in rows.items()
            if name != first and row["final"] is not None
        }
    tops = {}
    for key, _, high, _ in columns:  # what is best of a model that is none tells nothing
        known = [
            row[key]["mean"]
            for name, row in rows.items()
            if row[key] is not None and (swept or name == first or gaps.get(name, ("", False))[1])
        ]
        if high is not None and known:
            tops[key] = max(known) if high else min(known)
    body = []
    for name, row in rows.items():
        failed = sum(f"{name}, seed {seed}" in found["errors"] for seed in found["seeds"])
        about = [
            row["about"],
            f"failed for {failed} of {count(len(found['seeds']), 'seed')}" if failed else "",
            "" if row["has_student"] else "the clients' own models, on average",
        ]
        ours = row["kind"] == "fedkd" and not factors
        title, *others = [row["choices"][factor] for factor in factors] or [name]
        cells: list[str | Cell] = [Cell(title, " · ".join(filter(None, about)), ours), *others]
        for key, *_ in columns:
            value = row[key]
            top = key == "final" or (value is not None and value["mean"] == tops.get(key))
            cells.append(Cell(shown(key, value), strong=top))
            if key == "final" and gaps:
                text, chance = gaps.get(name, ("", False))
                cells.append(Cell(text, look="soft" if chance else ""))
        key = "" if factors else "student" if ours else "teacher"
        body.append(Row([*cells, str(len(row["seeds"]))], key))
    # A terminal has room for the choices of many factors or for all numbers, not for both.
    left_out = ("seconds", "down", "up")[: len(factors)] if len(factors) > 1 and not swept else ()
    header = [Column(title, look="first") for title in factors or ["method"]]
    for key, title, _, both in columns:
        on = "" if both and key not in left_out else "page"
        header.append(Column(title, number=True, on=on, look="" if key == "final" else "soft"))
        if key == "final" and gaps:
            header.append(Column("to the first", number=True, on="page"))
    header.append(Column("runs" if swept else "seeds", number=True, on="page", look="soft"))
    title = f"{found['name']} · {seeds(found['seeds'])}{tested(found['tests'])}"
    return Table(header, body, title)


def _tells(key: str, rows: Collection[Record]) -> bool:
    """Whether a column is shown: joules and noise where there are any, sizes where they differ."""
    if key not in ("joules", "multiply_adds", "noise"):
        return True
    known = {row[key]["mean"] for row in rows if row.get(key) is not None}
    return len(known) > (key == "multiply_adds")


def _comparison(found: Record) -> list[Section]:
    sections = [Section("results", "Results", [Card("", _CAPTION, table=result_table(found))])]
    names = ranked(found)
    if not names:
        return sections
    shown = figures.looks({name: row["kind"] for name, row in found["rows"].items()})
    records = {name: list(found["rows"][name]["seeds"].values()) for name in names}
    rounds = {
        name: [[each["accuracy"] for each in record["rounds"]] for record in runs]
        for name, runs in records.items()
    }
    traffic = {name: _traffic(runs) for name, runs in records.items()}
    per_class = [found["rows"][name]["per_class"] for name in names]
    for key, title, figure, caption in (
        (
            "rounds",
            "Accuracy per round",
            figures.rounds_figure(rounds, shown),
            "Mean over seeds; the band goes from the lowest to the highest seed. fedkd's rows are "
            "solid and wide. A method of one round is a single point.",
        ),
        (
            "bytes",
            "Accuracy per megabyte",
            figures.traffic_figure(traffic, shown),
            "Bytes sent so far, up and down, over all clients, on a logarithmic scale; a point per "
            "round. A hollow marker is where the method ends if the transfer set has to be shipped "
            "as well. What sends no messages is a level through the figure.",
        ),
        (
            "classes",
            "Accuracy per class",
            figures.heat_figure(names, found["classes"], per_class, full=True),
            "Test accuracy within each class after the last round, in percent, mean over seeds.",
        ),
    ):
        sections.append(Section(key, title, [Card("", caption, [figure])]))
    return sections


def _traffic(runs: Sequence[Record]) -> tuple[list[float], list[float], float]:
    """Means over seeds of bytes so far and accuracy after each round; of shipping, in the end."""
    length = min(len(record["rounds"]) for record in runs)
    rounds = [record["rounds"][:length] for record in runs]
    sizes = [list(accumulate(each["up"] + each["down"] for each in line)) for line in rounds]
    accuracy = [[each["accuracy"] for each in line] for line in rounds]
    transfer = float(np.mean([record["transfer"] for record in runs]))
    return np.mean(sizes, axis=0).tolist(), np.mean(accuracy, axis=0).tolist(), transfer


def _ablation(config: Ablation, found: Record) -> list[Section]:
    if not config.experiments:
        return [_setting(config, found, found["rows"], "s0", "Results")]
    return [
        _setting(
            config,
            found,
            [name for name, row in found["rows"].items() if row["choices"][EXPERIMENT] == setting],
            f"s{place}",
            setting,
        )
        for place, setting in enumerate(config.experiments)
    ]


def _setting(
    config: Ablation, found: Record, names: Iterable[str], key: str, title: str
) -> Section:
    """The cells of one setting: their table, main effects, and of two factors all cells."""
    factors = [factor for factor in found["factors"] if factor != EXPERIMENT]
    ranking = ranked(found)
    done = [name for name in ranking if name in names]
    missing = [name for name in names if name not in ranking]
    cards = [Card("", _CAPTION, table=result_table(found, [*done, *missing], factors))]
    rows = [found["rows"][name] for name in done]
    finals = [(row["choices"], row["final"]["mean"]) for row in rows]
    if not finals:
        return Section(key, title, cards)
    order = {f: [choice.label for choice in cs] for f, cs in config.factors().items()}
    grid = config.mode == "grid"
    effects = main_effects(finals, order, each=not grid)
    caption = (
        "A dot is a cell's final accuracy (mean over seeds), a bar the mean of all cells with that "
        "choice."
        if grid
        else "Each choice with all other factors at their first choice."
    )
    cards.append(Card("Main effects", caption, [figures.effects_figure(effects)]))
    if len(factors) == 2 and grid:
        choices = order[factors[0]], order[factors[1]]
        table, labels = two_way(finals, order), (factors[1], factors[0])
        figure = figures.heat_figure(*choices, table, labels=labels)
        caption = "Final test accuracy of each cell in percent, mean over seeds."
        cards.append(Card("Both factors", caption, [figure]))
    return Section(key, title, cards)


def _sweep(config: Sweep, found: Record) -> Section:
    notes = [found["promises"]] if found.get("promises") else []
    cards = [Card("", _CAPTION_SWEPT, table=result_table(found), notes=notes)]
    if ranked(found):
        students: dict[str, dict[str, list[float]]] = {}
        teachers: dict[str, dict[str, list[float]]] = {}
        for row in found["rows"].values():
            name, epsilon = row["choices"]["mechanism"], row["choices"]["epsilon"]
            for record in row["seeds"].values():
                students.setdefault(name, {}).setdefault(epsilon, []).append(record["final"])
                if record["teachers"] is not None:
                    known = teachers.setdefault(name, {}).setdefault(epsilon, [])
                    known.append(record["teachers"])
        order = [budget(epsilon) for epsilon in sorted(config.epsilons)]
        cards.append(
            Card(
                "Accuracy for epsilon",
                "Solid: the student; dashed: its teachers, on average. Mean over runs, and from "
                "the lowest to the highest. Stronger privacy is to the left; at inf nothing is "
                "promised.",
                [figures.budget_figure(order, students, teachers)],
            )
        )
    return Section("results", "Results", cards)
