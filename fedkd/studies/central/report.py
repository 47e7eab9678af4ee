"""A study as one HTML page that needs nothing else; also of one that is under way."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fedkd.knowledge.store import write_atomically
from fedkd.reporting import figures
from fedkd.studies.central.config import BASELINE
from fedkd.studies.central.folder import Record, StudyFolder
from fedkd.studies.central.page import PAGE
from fedkd.studies.central.pictures import curves_picture, methods_picture
from fedkd.studies.central.results import results

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def write_report(folder: StudyFolder) -> Path:
    """Write `report.html` into the study's folder and return its path."""
    path = folder.path / "report.html"
    write_atomically(path, render(folder).encode("utf-8"))
    return path


def render(folder: StudyFolder) -> str:
    """The page as text."""
    study, found = folder.study, results(folder)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent, "spread": spread, "rate": _rate, "duration": _duration,
    }  # fmt: skip
    rows = [_method(name, row, found) for name, row in found["methods"].items()]
    rows.sort(key=lambda row: (row["last"] or {"mean": -1.0})["mean"], reverse=True)
    done = [row for row in rows if row["last"] is not None and not row["baseline"]]
    with figures.style():
        overview, curves = _overview(found), _curves(folder, found)
        details = [card for name in found["methods"] if (card := _details(folder, name))]
    return environment.from_string(PAGE).render(
        study=study,
        identity=folder.path.name,
        date=_date(folder),
        state=_state(found, len(study.seeds)),
        seeds=f"seed {study.seeds[0]}" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds",
        sentence=_sentence(folder, found),
        best={"name": done[0]["name"], "value": done[0]["last"]} if done else None,
        tiles=_tiles(found),
        teachers=[_teacher(number, row, found) for number, row in enumerate(found["teachers"])],
        methods=rows,
        overview=overview,
        curves=curves,
        details=details,
        config=(folder.path / "config.yaml").read_text(encoding="utf-8"),
        versions=folder.read_json("versions.json") or {},
    )


# -- words and numbers -----------------------------------------------------------------------------


def _state(found: Record, seeds: int) -> Record:
    total = seeds * len(found["methods"])
    done = sum(len(row["seeds"]) for row in found["methods"].values())
    if found["finished"]:
        return {"kind": "complete", "text": "complete"}
    return {"kind": "partial", "text": f"not complete · {done} of {total} students so far"}


def _sentence(folder: StudyFolder, found: Record) -> str:
    study = folder.study
    teachers = " and ".join(row["model"] for row in found["teachers"])
    count = len(found["methods"]) - 1
    recipe = study.recipe
    return (
        f"One {found['student']} learns from {teachers} on {found['dataset']} by "
        f"{count} method{'s' if count != 1 else ''}, and alone. {recipe.epochs} epochs, batches "
        f"of {recipe.batch_size}, {recipe.optimizer.name} at {recipe.optimizer.lr:g}, "
        f"{recipe.augment}, {recipe.precision}; methods with a recipe of their own differ."
    )


def _tiles(found: Record) -> list[tuple[str, str, str]]:
    tiles = []
    known = [row for row in found["teachers"] if row["last"] is not None]
    if known:
        top = max(known, key=lambda row: row["last"]["mean"])
        tiles.append(("best teacher", percent(top["last"]["mean"]), _size(top)))
    alone = found["methods"][BASELINE]
    if alone["last"] is not None:
        tiles.append(("student alone", percent(alone["last"]["mean"]), _size(alone)))
    tried = [row for name, row in found["methods"].items() if name != BASELINE]
    gains = [gain for row in tried if len(gain := _gains(row, alone)) > 1]
    if gains:
        sure = sum(mean - half > 0 for mean, half in map(_interval, gains))
        told = f"95 % interval of the gain above 0, {len(alone['seeds'])} seeds"
        tiles.append(("methods that surely help", f"{sure} of {len(gains)}", told))
    spent = sum(
        result["seconds"] for row in found["methods"].values() for result in row["seeds"].values()
    )
    if spent:
        tiles.append(("training of students", _duration(spent), "without evaluation"))
    return tiles


def _gains(row: Record, alone: Record) -> list[float]:
    """Gains over the student alone, seed by seed."""
    return [
        result["last"] - alone["seeds"][seed]["last"]
        for seed, result in row["seeds"].items()
        if seed in alone["seeds"]
    ]


# Student's t at 95 %, two-sided, from one degree of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean of at least two values and half of its 95 % confidence interval."""
    t = _T[min(len(values) - 1, len(_T)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def _size(row: Record) -> str:
    return f"{row['parameters']:,} parameters"


def _teacher(number: int, row: Record, found: Record) -> Record:
    many = len(found["teachers"]) > 1
    source = f"read from {row['source']}" if row["source"] else "trained here"
    size = f", {_size(row)}" if row["parameters"] else ""
    name = f"teacher {number}" if many else "teacher"
    return {**row, "name": name, "about": f"{row['model']}{size}, {source}"}


def _method(name: str, row: Record, found: Record) -> Record:
    about = " + ".join(
        f"{term['weight']:g} {TIMES} {term['name']}" if term["weight"] != 1 else term["name"]
        for term in row["losses"]
    )
    if row["assistants"]:
        way = "each from all before it" if row["guidance"] == "dense" else "each from the last"
        about += f"; by way of {', '.join(row['assistants'])}, {way}"
    alone = found["methods"][BASELINE]["last"]
    tops = [t["last"]["mean"] for t in found["teachers"] if t["last"] is not None]
    gain = share = ""
    if name != BASELINE and alone and row["last"]:
        difference = row["last"]["mean"] - alone["mean"]
        gain = _points(difference)
        if len(gains := _gains(row, found["methods"][BASELINE])) > 1:
            gain += f" ± {100 * _interval(gains)[1]:.2f}"
        lead = max(tops, default=0.0) - alone["mean"]
        share = f"{100 * difference / lead:.0f} %".replace("-", MINUS) if lead > 0.002 else DASH
    return {
        **row,
        "name": "student alone" if name == BASELINE else name,
        "baseline": name == BASELINE,
        "about": "cross entropy, no teacher" if name == BASELINE and about == "ce" else about,
        "gain": gain,
        "share": share,
        "seeds": len(row["seeds"]),
    }


def percent(value: float | None) -> str:
    """`87.12 %`, or a dash for what is not known: tenths matter between methods."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def spread(row: Mapping[str, Any] | None) -> str:
    """`87.12 ± 0.20 %`; without a deviation for one seed."""
    if row is None:
        return DASH
    if row["std"] is None:
        return percent(row["mean"])
    return f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f} %"


def _points(gap: float) -> str:
    sign = "+" if gap > 0 else MINUS if gap < 0 else "±"
    return f"{sign}{abs(100 * gap):.2f}"


def _rate(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _date(folder: StudyFolder) -> str:
    match = re.search(r"-(\d{8}-\d{6})-[0-9a-f]{4}$", folder.path.name)
    if match:
        moment = time.strptime(match[1], "%Y%m%d-%H%M%S")
    else:
        moment = time.localtime((folder.path / "config.yaml").stat().st_mtime)
    return time.strftime("%Y-%m-%d %H:%M", moment)


# -- pictures --------------------------------------------------------------------------------------


def _overview(found: Record) -> Markup | None:
    finished = {name: row for name, row in found["methods"].items() if row["last"] is not None}
    if not finished:
        return None
    last, best = (
        {name: [r[key] for r in row["seeds"].values()] for name, row in finished.items()}
        for key in ("last", "best")
    )
    teachers = {
        f"teacher {number} ({row['model']})" if len(found["teachers"]) > 1 else
        f"teacher ({row['model']})": row["last"]["mean"]
        for number, row in enumerate(found["teachers"])
        if row["last"] is not None
    }  # fmt: skip
    return Markup(figures.svg(methods_picture(last, best, BASELINE, teachers), "overview"))


def _curves(folder: StudyFolder, found: Record) -> Markup | None:
    curves = {}
    for name in found["methods"]:
        seeds = [folder.student(name, seed).epochs() for seed in folder.study.seeds]
        lines = [
            {epoch["epoch"]: epoch["accuracy"] for epoch in epochs if epoch["accuracy"] is not None}
            for epochs in seeds
        ]
        lines = [line for line in lines if line]
        if lines:
            curves[name] = lines
    if not curves:
        return None
    tops = [row["last"]["mean"] for row in found["teachers"] if row["last"] is not None]
    return Markup(figures.svg(curves_picture(curves, BASELINE, max(tops, default=None)), "curves"))


def _details(folder: StudyFolder, name: str) -> Record | None:
    """Terms and gradients of a method's first seed; None for what has a single loss."""
    losses = folder.study.runs()[name].losses
    seed = folder.study.seeds[0]
    epochs = folder.student(name, seed).epochs()
    if not epochs or (name == BASELINE and len(losses) == 1):
        return None
    nan = float("nan")
    names = list(dict.fromkeys(term for epoch in epochs for term in epoch["terms"]))
    terms = {"total": [e["loss"] for e in epochs]} if len(names) > 1 else {}
    terms |= {term: [e["terms"].get(term, nan) for e in epochs] for term in names}
    weights = {}
    if len(losses) == len(names):
        weights = {n: t.weight for n, t in zip(names, losses, strict=True) if t.weight != 1}
    once = [1] * len(epochs)
    pulls = None
    if any(epoch["gradients"] for epoch in epochs):
        norms = {term: [e["gradients"].get(term, nan) for e in epochs] for term in names}
        pulls = Markup(figures.svg(figures.pull_picture(norms, once), f"pull-{name}"))
    return {
        "name": name,
        "seed": seed,
        "about": ", ".join(names),
        "terms": Markup(figures.svg(figures.loss_picture(terms, once, weights), f"terms-{name}")),
        "pulls": pulls,
    }
