"""What a student has taken over, as one page and one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedkd.reporting import format as fmt
from fedkd.reporting import page
from fedkd.reporting.page import Card, Page, Section, Tile, half
from fedkd.reporting.table import Cell, Column, Row, Table, numbers, plain, words
from fedkd.studies.inspection import figures
from fedkd.studies.inspection.subjects import Subjects
from fedkd.training.properties.base import Scene
from fedkd.training.properties.compare import AWAY, CHANGED, TAKEN
from fedkd.training.properties.localisation import cosines
from fedkd.training.properties.readers import NotMeasured

PAGE = "properties.html"
SHOWN = 8  # images whose class maps are drawn
FEW = 3  # methods whose bars are drawn at first

_LIKENESS = (
    "Each bar says how like the teacher a network is, so the teacher's own is 1. The line on the "
    "independent student reaches as far as another seed moves it: only a difference that is larger "
    "counts."
)
_OWN = (
    "These each network has by itself. Taken over means that distillation moved the student "
    "towards the teacher's value by more than another seed does, for better or worse."
)
_TABLE = (
    "Distilled less independent student, and the largest difference that another seed of the "
    "independent student makes. Only what is larger counts."
)


def write_page(folder: Path, facts: Mapping[str, Any], subjects: Subjects, scene: Scene) -> Path:
    """Write `properties.html` and return its path."""
    return page.write(folder / PAGE, make_page(facts, subjects, scene))


def make_page(facts: Mapping[str, Any], subjects: Subjects, scene: Scene) -> Page:
    """Everything on the page."""
    counted, measured = _taken(facts)
    many = len(facts["methods"]) > 1
    sentence = facts["about"]
    best = max(counted, key=lambda name: counted[name])
    where = f", {best}" if many else ""
    return Page(
        title=f"What the {'students' if many else 'student'} took over",
        sentence=sentence,
        sections=[
            Section("properties", "What was taken over", _results(facts)),
            Section("sight", "Where they look", _sight(facts, subjects, scene)),
            Section("changed", "Under changed images", _changed(facts)),
            Section("bias", "Who gains", _bias(facts)),
            Section("teachers", "Teacher by teacher", _teachers(facts)),
            Section("left-out", "Left out, and how it was measured", _method(facts)),
            Section("again", "Again", [page.again(facts.get("command", ""))]),
        ],
        footer=facts["name"],
        remarks=[
            facts["name"],
            fmt.seeds(facts["seeds"]),
            fmt.count(facts["images"], "test image"),
        ],
        headline=(f"{counted[best]} of {measured}", f"properties taken over{where}"),
        tiles=_tiles(facts),
        notes=facts["notes"],
    )


def _taken(facts: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Method -> properties that were taken over; and how many were measured."""
    found = {
        method: sum(
            about["methods"].get(method, {}).get("verdict") == TAKEN
            for about in facts["properties"].values()
        )
        for method in facts["methods"]
    }
    return found, len(facts["properties"])


def _tiles(facts: Mapping[str, Any]) -> list[Tile]:
    scores, tiles = facts["accuracy"], []
    if scores["teacher"] is not None:
        tiles.append(Tile("teacher", fmt.percent(scores["teacher"]), "test accuracy"))
    for name, value in scores["methods"].items():
        gap = fmt.points(value - scores["alone"])
        tiles.append(Tile(_names(facts)[name], fmt.percent(value), f"{gap} to independent"))
    tiles.append(Tile("independent student", fmt.percent(scores["alone"]), "test accuracy"))
    return tiles


def _names(facts: Mapping[str, Any]) -> dict[str, str]:
    """Who -> as legends call it."""
    one = len(facts["methods"]) == 1
    names = {name: "distilled student" if one else name for name in facts["methods"]}
    return {"teacher": "teacher", "alone": "independent student", **names}


def _results(facts: Mapping[str, Any]) -> list[Card]:
    methods, found = facts["methods"], facts["properties"]
    cards = []
    many = len(methods) > FEW
    if many and found:
        caption = (
            "Distilled less independent student, in hundredths; in brackets where another seed of "
            "the independent student makes as large a difference."
        )
        cards.append(Card("All methods", caption, [figures.methods_heat(found, methods)]))
    for title, caption, likeness in (
        ("How like the teacher", _LIKENESS, True),
        ("Each by itself", _OWN, False),
    ):
        some = {name: each for name, each in found.items() if each["likeness"] is likeness}
        some = dict(sorted(some.items(), key=lambda item: item[1]["title"]))
        if some:
            drawn = [figures.bars_figure(some, methods, _names(facts))]
            fold = f"{title}, method by method" if many else ""
            cards.append(Card("" if many else title, caption, drawn, fold=fold))
    table = properties_table(facts)
    rows = len(table.rows)
    cards.append(Card("", _TABLE, table=table, fold=fmt.count(rows, "row") if rows > 30 else ""))
    return cards


def properties_table(facts: Mapping[str, Any]) -> Table:
    """A row for each property, and each method."""
    many, seeds = len(facts["methods"]) > 1, len(facts["seeds"]) > 1
    columns = [
        Column("property", look="first"),
        *(words("method") if many else []),
        *numbers("teacher", "distilled", "independent", "difference"),
        *(numbers("± error") if seeds else []),
        *numbers("another seed", look="soft"),
        Column("so", look="name"),
    ]
    rows = []
    for about in sorted(facts["properties"].values(), key=lambda each: each["title"]):
        for place, (method, row) in enumerate(about["methods"].items()):
            digits = (lambda v: fmt.percent(v)) if about["percent"] else _two
            factor = 100 if about["percent"] else 1
            form = "+.1f" if about["percent"] else "+.3f"
            plain_form = form.removeprefix("+")
            cells: list[str | Cell] = [
                Cell("" if place else about["title"], "" if place else about["question"])
            ]
            if many:
                cells.append(method)
            cells += [digits(row[key]) for key in ("teacher", "student", "alone")]
            cells.append(fmt.number(_times(row["difference"], factor), form))
            if seeds:
                cells.append(fmt.number(_times(row["error"], factor), plain_form))
            cells.append(fmt.number(_times(row["spread"], factor), plain_form))
            strong = row["verdict"] in (TAKEN, AWAY, CHANGED)
            cells.append(Cell(row["verdict"], strong=strong))
            rows.append(Row(cells, begins=many and not place))
    counted, measured = _taken(facts)
    title = ", ".join(
        f"{name}: {count} of {measured}" if many else f"{count} of {measured} properties"
        for name, count in counted.items()
    )
    note = " · ".join(f"{name}: {why}" for name, why in facts["left_out"].items())
    return Table(columns, rows, f"taken over {title}", f"left out: {note}" if note else "")


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None or not math.isfinite(value) else factor * value


def _two(value: float | None) -> str:
    return fmt.number(value, ".3f")


def _sight(facts: Mapping[str, Any], subjects: Subjects, scene: Scene) -> list[Card]:
    found = facts["properties"].get("sight")
    if found is None:
        return []
    trial, method = subjects.trials[0], facts["methods"][0]
    teacher = trial.gradients or trial.teacher
    assert teacher is not None
    readers = {"teacher": teacher, method: trial.distilled[method], "alone": trial.alone[0]}
    names = _names(facts) | ({"teacher": teacher.name} if trial.gradients else {})
    step = max(1, len(scene.images) // SHOWN)
    shown = torch.arange(len(scene.images))[::step][:SHOWN]
    try:
        maps = {who: scene.maps(reader) for who, reader in readers.items()}
    except NotMeasured:
        return []
    rows = [(names[who], own[shown]) for who, own in maps.items()]
    classes = [scene.images.classes[int(label)] for label in scene.labels[shown]]
    drawn = figures.maps_figure(scene.images.images[shown].cpu(), rows, classes)
    ours, theirs = (cosines(maps[who], maps["teacher"]).nanmean() for who in (method, "alone"))
    caption = (
        "Grad-CAM of the true class at the last map; bright is what speaks for it. Mean cosine "
        f"with the teacher's map: distilled {float(ours):.2f}, independent {float(theirs):.2f}."
    )
    cards = [Card("Class maps of the same images", caption, [drawn])]
    parts = found["methods"][method]["parts"]
    curves = {
        who: parts[key]["curve"]
        for who, key in (("teacher", "teacher"), (method, "student"), ("alone", "alone"))
        if "curve" in parts.get(key, {})
    }
    areas = "; ".join(
        f"{names[who]} {parts[key]['area']:.2f} ({parts[key]['other_area']:.2f})"
        for who, key in (("teacher", "teacher"), (method, "student"), ("alone", "alone"))
        if "area" in parts.get(key, {})
    )
    ticks = [f"{10 * number}" for number in range(11)]
    cards.append(
        half(
            "Deletion curve",
            "Accuracy while the pixels that the network's own map shows brightest are greyed "
            "first. The faster it falls, the more the map names the pixels that matter. Area under "
            f"the curve, in brackets that with the map of another image: {areas}.",
            figures.lines_figure(
                curves, ticks, facts["methods"], names, "% of the pixels greyed", "accuracy"
            ),
        )
    )
    return cards


# Property -> title, axis.
_CURVES = {
    "shift": ("Shifts", "moved by", "same class"),
    "colour": ("Colours", "jitter", "same class"),
    "domains": ("Agreement on unseen domains", "", "same class as the teacher"),
    "adaptation": ("Accuracy on unseen domains", "", "accuracy"),
}


def _changed(facts: Mapping[str, Any]) -> list[Card]:
    cards = []
    for name, (title, xlabel, ylabel) in _CURVES.items():
        about = facts["properties"].get(name)
        if about is None:
            continue
        curves: dict[str, Sequence[float]] = {}
        ticks: list[str] = []
        for method, row in about["methods"].items():
            parts = row["parts"]
            wanted = {"teacher": "teacher", method: "student", "alone": "alone"}
            for who, key in wanted.items():
                if key in parts and (key != "teacher" or name != "domains"):
                    ticks = [part.removeprefix("strength ") for part in parts[key]]
                    curves[who] = list(parts[key].values())
        if curves:
            drawn = figures.lines_figure(
                curves, ticks, facts["methods"], _names(facts), xlabel, ylabel
            )
            cards.append(half(title, about["question"], drawn))
    return cards


def _bias(facts: Mapping[str, Any]) -> list[Card]:
    groups, cards = facts["groups"], []
    method = facts["methods"][0]
    if groups and "teacher" in groups["accuracies"]:
        many = len(facts["methods"]) > 1
        caption = (
            f"For each {groups['of']}, from the teacher's weakest to its strongest. Where both "
            "bars point the same way, the student inherits what the teacher is bad or good at."
        )
        caption += f" The student is that of {method}." if many else ""
        drawn = figures.bias_figure(groups, method)
        cards.append(Card(f"Accuracy per {groups['of']}", caption, [drawn]))
    if facts["clients"]:
        cards.append(
            Card(
                "Gain by client",
                "Accuracy of the distilled student over the independent one, on test images "
                "weighed as the client's classes are; pale: what another seed makes. Clients from "
                "the largest share in the fused labels to the smallest.",
                [figures.clients_figure(facts["clients"])],
            )
        )
    return cards


def _teachers(facts: Mapping[str, Any]) -> list[Card]:
    if not facts["by_teacher"]:
        return []
    titles = {name: about["title"] for name, about in facts["properties"].items()}
    caption = (
        "How much more like each single teacher the distilled student is than the independent one, "
        "in hundredths; in brackets where another seed makes as large a difference."
    )
    known = {
        who: {name: each for name, each in row.items() if name in titles}
        for who, row in facts["by_teacher"].items()
    }
    return [Card("", caption, [figures.teachers_heat(known, titles)])]


def _method(facts: Mapping[str, Any]) -> list[Card]:
    cards = []
    if facts["left_out"]:
        table = plain(words("property", "why it was left out"), facts["left_out"].items())
        cards.append(Card("", table=table))
    lines = [
        (about["title"], about["question"], _basis(name, about))
        for name, about in facts["properties"].items()
    ]
    cards.append(
        Card(
            "",
            "After Ojha et al., NeurIPS 2023, arXiv:2205.16004.",
            table=plain(words("property", "question", "measured on"), lines),
            fold="How it was measured",
        )
    )
    return cards


def _basis(name: str, about: Mapping[str, Any]) -> str:
    row = next(iter(about["methods"].values()))
    what = {"boundary": "plane", "bias": "class"}.get(name, "image")
    many = "classes" if what == "class" and row["count"] != 1 else None
    text = f"{row['count']:,} {many}" if many else fmt.count(row["count"], what)
    unrelated = {key: part.get("unrelated") for key, part in row["parts"].items()}
    if fmt.known(unrelated.get("student")) and fmt.known(unrelated.get("alone")):
        ours, theirs = (fmt.percent(unrelated[key]) for key in ("student", "alone"))
        text += f"; attack on an unrelated network: distilled {ours}, independent {theirs}"
    return text
