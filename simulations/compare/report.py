"""A comparison as one HTML page that needs nothing else; also of one that is under way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fedkd.io.records import SHAPES, read_json
from fedkd.knowledge.store import write_atomically
from fedkd.reporting import drawing as figures
from fedkd.reporting.format import human_bytes
from fedkd.studies.engine import REPORT, Record
from simulations.compare import pictures
from simulations.compare.config import Comparison, SideBySideConfig
from simulations.compare.effects import main_effects, two_way
from simulations.compare.grid import EXPERIMENT, Ablation
from simulations.compare.page import PAGE
from simulations.compare.sweep import Sweep, budget

DASH = "\N{EN DASH}"

# Key of a result, title, whether a high number is a good one (None: neither).
_COLUMNS: tuple[tuple[str, str, bool | None], ...] = (
    ("final", "last round", True),
    ("best", "best round", None),
    ("worst_client", "worst client", True),
    ("ece", "ECE", False),
    ("up", "bytes up", None),
    ("down", "bytes down", None),
    ("transfer", "transfer set", None),
    ("seconds", "seconds", None),
)
_SWEPT = (*_COLUMNS[:1], ("teachers", "teachers", None), ("spent", "epsilon spent", None),
          *(column for column in _COLUMNS[3:] if column[0] != "transfer"))  # fmt: skip

_CAPTION = (
    "Test accuracy in percent, mean ± sample standard deviation over seeds. The last round "
    "involves no choice; the best round is chosen on the test set and flatters. Worst client: the "
    "final model on the client's held-out private images where it does worst. ECE: expected "
    "calibration error in percent, lower is better. Bytes: messages as Flower serialises them, "
    "summed over clients and rounds, without those that only measure. Transfer set: its images as "
    "uint8, sent to each client once, if clients do not have them; not in the other columns. "
    "Seconds: all of it one after the other in one process; teachers that several rows share "
    "count for each."
)


def write_report(config: SideBySideConfig, folder: Path, found: Record) -> Path:
    """Write `report.html` and return its path."""
    path = folder / REPORT
    write_atomically(path, render(config, folder, found).encode("utf-8"))
    return path


def render(config: SideBySideConfig, folder: Path, found: Record) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    with figures.style():
        if isinstance(config, Sweep):
            sections = _sweep(config, found)
        elif isinstance(config, Ablation):
            sections = _ablation(config, found)
        else:
            sections = _comparison(found)
    # What sends nothing is a bound, not a federated method.
    best = [name for name in ranked(found) if found["rows"][name]["up"]["mean"] > 0][:1]
    state = {"kind": "complete", "text": "complete"} if found["finished"] else {
        "kind": "partial", "text": _progress(found),
    }  # fmt: skip
    seeds = found["seeds"]
    return environment.from_string(PAGE).render(
        name=found["name"],
        identity=folder.name,
        date=time.strftime("%Y-%m-%d %H:%M", time.localtime(_written(folder))),
        state=state,
        seeds=f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds",
        sentence=_sentence(config, found),
        best=None
        if not best or found["factors"]
        else {"name": best[0], "value": f"{shown('final', found['rows'][best[0]]['final'])} %"},
        failures=[f"{label} failed: {error}" for label, error in found["errors"].items()],
        sections=sections,
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        versions=read_json(folder / "versions.json", SHAPES["versions.json"]) or {},
    )


# -- words and numbers -----------------------------------------------------------------------------


def ranked(found: Record) -> list[str]:
    """Names of rows with a result, best first."""
    known = {name: row for name, row in found["rows"].items() if row["final"] is not None}
    return sorted(known, key=lambda name: -known[name]["final"]["mean"])


def shown(key: str, value: Mapping[str, Any] | None) -> str:
    """A mean and its deviation as the tables write it; a dash for what is not known."""
    if value is None:
        return DASH
    mean, std = value["mean"], value["std"]
    if key in ("up", "down", "transfer"):
        return human_bytes(mean) if mean else "0"
    if key == "spent":
        return f"{mean:.3g}"
    if key == "seconds":
        return f"{mean:.1f}" if mean < 100 else f"{mean:,.0f}"
    digits = 1 if key == "worst_client" else 2
    text = f"{100 * mean:.{digits}f}"
    return text if std is None else f"{text} ± {100 * std:.{digits}f}"


def _progress(found: Record) -> str:
    total = len(found["seeds"]) * len(found["rows"])
    done = sum(len(row["seeds"]) for row in found["rows"].values())
    return f"not complete · {done} of {total} results"


def _sentence(config: SideBySideConfig, found: Record) -> str:
    data, rounds = config.experiment.data, config.experiment.rounds
    what = (
        f"{len(found['rows'])} methods"
        if isinstance(config, Comparison)
        else f"{len(found['rows'])} cells of {' × '.join(f for f in found['factors'])}"
    )
    counts = sorted({entry.experiment.clients for entry in config.entries()})
    clients = " or ".join(map(str, counts))
    names = list(config.experiments) if isinstance(config, Ablation) else []
    where = ", ".join(names) if names else (
        f"{data.dataset.name}, {clients} clients, {data.partition.name} partition"
        + (f" (alpha {data.partition.options['alpha']})" if "alpha" in data.partition.options
           else "")
        + f", {data.transfer.size:,} transfer images, {rounds} "
        + ("round" if rounds == 1 else "rounds")
    )  # fmt: skip
    shared = (
        "All cells of a seed share what is not changed."
        if not isinstance(config, Comparison)
        else "The same split, seed, initial networks and local training for all."
    )
    return f"{what} on {where}. {shared}"


def _written(folder: Path) -> float:
    return (folder / "versions.json").stat().st_mtime


def _table(
    found: Record,
    names: Iterable[str],
    factors: Sequence[str],
    columns: Sequence[tuple[str, str, bool | None]] = _COLUMNS,
    caption: str = "",
) -> Record:
    """The table's card; the best mean of a column stands out."""
    rows = {name: found["rows"][name] for name in names}
    tops = {}
    for key, _, high in columns:
        known = [row[key]["mean"] for row in rows.values() if row[key] is not None]
        if high is not None and known:
            tops[key] = max(known) if high else min(known)
    body = []
    for name, row in rows.items():
        numbers = [
            {
                "text": shown(key, row[key]),
                "top": key == "final"
                or (row[key] is not None and row[key]["mean"] == tops.get(key)),
            }
            for key, _, _ in columns
        ]
        failed = sum(f"{name}, seed {seed}" in found["errors"] for seed in found["seeds"])
        text = f" · failed for {failed} of {len(found['seeds'])} seeds"
        about = row["about"] + (text if failed else "")
        if not row["has_student"]:
            about = f"{about} · the clients' own models, on average".strip(" ·")
        body.append({
            "ours": row["kind"] == "fedkd" and not factors,
            "key": not factors,
            "words": [row["choices"][f] for f in factors] if factors else [name],
            "about": about.strip(" ·"),
            "numbers": [*numbers, {"text": str(len(row["seeds"])), "top": False}],
        })  # fmt: skip
    titles = [(factor, False) for factor in factors] or [("method", False)]
    header = [*titles, *((title, True) for _, title, _ in columns), ("seeds", True)]
    return {
        "title": "", "picture": None, "header": header, "rows": body,
        "caption": caption or _CAPTION,
    }  # fmt: skip


# -- sections --------------------------------------------------------------------------------------


def _comparison(found: Record) -> list[Record]:
    names = ranked(found)
    missing = [name for name in found["rows"] if name not in names]
    sections = [_section("results", "Results", _table(found, [*names, *missing], ()))]
    if not names:
        return sections
    looks = pictures.looks({name: row["kind"] for name, row in found["rows"].items()})
    records = {name: list(found["rows"][name]["seeds"].values()) for name in names}
    curves = {
        name: [[each["accuracy"] for each in record["rounds"]] for record in seeds]
        for name, seeds in records.items()
    }
    sections.append(_section("rounds", "Accuracy per round", _picture(
        pictures.curves_picture(curves, looks), "curves",
        "Mean over seeds; the band goes from the lowest to the highest seed. fedkd's rows are "
        "solid and wide. A method of one round is a single point.",
    )))  # fmt: skip
    traffic = {name: _traffic(seeds) for name, seeds in records.items()}
    sections.append(_section("bytes", "Accuracy per megabyte", _picture(
        pictures.traffic_picture(traffic, looks), "traffic",
        "Bytes sent so far, up and down, over all clients, on a logarithmic scale; a point per "
        "round. A hollow marker is where the method ends if the transfer set has to be shipped "
        "as well. What sends no messages is a level through the picture.",
    )))  # fmt: skip
    sections.append(_section("classes", "Accuracy per class", _picture(
        pictures.heat_picture(
            names, found["classes"], [found["rows"][name]["per_class"] for name in names],
            full=True,
        ), "classes",
        "Test accuracy within each class after the last round, in percent, mean over seeds.",
    )))  # fmt: skip
    return sections


def _traffic(seeds: Sequence[Record]) -> tuple[list[float], list[float], float]:
    """Means over seeds of bytes so far and accuracy after each round; of shipping, in the end."""
    length = min(len(record["rounds"]) for record in seeds)
    rounds = [record["rounds"][:length] for record in seeds]
    sizes = [list(accumulate(each["up"] + each["down"] for each in line)) for line in rounds]
    accuracy = [[each["accuracy"] for each in line] for line in rounds]
    transfer = float(np.mean([record["transfer"] for record in seeds]))
    return np.mean(sizes, axis=0).tolist(), np.mean(accuracy, axis=0).tolist(), transfer


def _ablation(config: Ablation, found: Record) -> list[Record]:
    factors = [factor for factor in found["factors"] if factor != EXPERIMENT]
    ranking = ranked(found)
    names = [*ranking, *(name for name in found["rows"] if name not in ranking)]
    settings: list[str | None] = [*config.experiments] or [None]
    sections = []
    for number, setting in enumerate(settings):
        own = [
            name
            for name in names
            if setting is None or found["rows"][name]["choices"][EXPERIMENT] == setting
        ]
        cards = [_table(found, own, factors)]
        finals = {
            name: (found["rows"][name]["choices"], found["rows"][name]["final"]["mean"])
            for name in own
            if found["rows"][name]["final"] is not None
        }
        if finals:
            order = {f: [choice.label for choice in cs] for f, cs in config.factors().items()}
            effects = main_effects(finals.values(), order, each=config.mode == "each")
            cards.append(_picture(
                pictures.effects_picture(effects), f"effects-{number}",
                "A dot is a cell's final accuracy (mean over seeds), a bar the mean of all cells "
                "with that choice." if config.mode == "grid" else
                "Each choice with all other factors at their first choice.",
                "Main effects",
            ))  # fmt: skip
            if len(factors) == 2 and config.mode == "grid":
                rows, columns = (order[factor] for factor in factors)
                cards.append(_picture(
                    pictures.heat_picture(
                        rows, columns, two_way(finals.values(), order),
                        labels=(factors[1], factors[0]),
                    ), f"heat-{number}",
                    "Final test accuracy of each cell in percent, mean over seeds.", "Both factors",
                ))  # fmt: skip
        sections.append(_section(f"s{number}", setting or "Results", *cards))
    return sections


def _sweep(config: Sweep, found: Record) -> list[Record]:
    cards = [_table(
        found, found["rows"], found["factors"], _SWEPT,
        "Test accuracy in percent, mean ± sample standard deviation over seeds, after the last "
        "round. Teachers: mean over clients, where their answers about test images are covered by "
        "the promise. Epsilon spent: of the worst client, by the run's ledger; nothing is promised "
        "at inf. Seconds: one process, all clients one after the other.",
    )]  # fmt: skip
    if ranked(found):
        curves: dict[str, dict[str, list[float]]] = {}
        teachers: dict[str, dict[str, list[float]]] = {}
        for row in found["rows"].values():
            name, epsilon = row["choices"]["mechanism"], row["choices"]["epsilon"]
            for record in row["seeds"].values():
                curves.setdefault(name, {}).setdefault(epsilon, []).append(record["final"])
                if record["teachers"] is not None:
                    told = teachers.setdefault(name, {}).setdefault(epsilon, [])
                    told.append(record["teachers"])
        order = [budget(epsilon) for epsilon in sorted(config.epsilons)]
        cards.append(_picture(
            pictures.budget_picture(order, curves, teachers), "budget",
            "Solid: the student; dashed: its teachers, on average. Mean over seeds, and from the "
            "lowest to the highest. Stronger privacy is to the left; at inf nothing is promised.",
            "Accuracy for epsilon",
        ))  # fmt: skip
    return [_section("results", "Results", *cards)]


def _section(key: str, title: str, *cards: Record) -> Record:
    return {"key": key, "title": title, "cards": cards}


def _picture(figure: Any, name: str, caption: str, title: str = "") -> Record:
    drawn = Markup(figures.svg(figure, name))
    return {"title": title, "picture": drawn, "header": (), "rows": (), "caption": caption}
