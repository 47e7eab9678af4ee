"""A page over a folder of runs and studies: a table, curves beside each other, configs compared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from fedkd.config import ConfigError, read_yaml
from fedkd.io.records import read_json
from fedkd.reporting import drawing, page
from fedkd.reporting import format as fmt
from fedkd.reporting.page import Card, Page, Section
from fedkd.reporting.run_record import TROUBLE, Found
from fedkd.reporting.table import Cell, Column, Row, Table, numbers, words
from fedkd.runs.directory import RunDirectory
from fedkd.runs.tracking import flat
from fedkd.studies.engine import REPORT, RESULTS, kind_of

INDEX = "index.html"
_DEEP = 4  # folders below the one that is looked at
_SHOWN = 8  # curves that are drawn before anybody has chosen
_CURVES = 40  # the newest runs that can be chosen
_ELSEWHERE = ("wandb", "mlruns", "tensorboard")


@dataclass(frozen=True)
class Listed:
    """A run or a study, as far as it can be read.

    Attributes:
        path: Its folder.
        kind: `run`, or the command of the study.
        date: When it began; sorts by time.
        state: `complete`, `3 of 8 rounds`, or what is wrong with it.
        problem: Whether it is damaged.
        accuracy: Of the student, with what it is counted on; of a study its best row.
        about: What it is about: data set, student, rules.
        cells: Ensemble, rounds, bytes, time.
        curve: Rounds, accuracies and bytes so far.
        config: Dotted key -> value.
    """

    path: Path
    kind: str
    date: str = ""
    state: str = ""
    problem: bool = False
    accuracy: Cell | str = ""
    about: str = ""
    cells: Sequence[str] = ("", "", "", "")
    curve: tuple[list[int], list[float], list[float]] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def write_index(folder: Path, out: Path | None = None) -> Path:
    """Write the page over all runs and studies below a folder, and return its path.

    They are only read. One that is damaged is a row with its reason.

    Args:
        folder: Of runs and studies, at most four levels deep.
        out: The page; default: `index.html` in the folder.

    Raises:
        ConfigError: there is no such folder, or nothing in it.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give the one that holds runs, e.g. runs")
    if (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is itself a run or study; give the folder that it lies in")
    found = sorted(map(_listed, _folders(folder, _DEEP)), key=lambda each: each.date, reverse=True)
    if not found:
        raise ConfigError(f"{folder} holds no run and no study (no folder with a config.yaml)")
    out = out or folder / INDEX
    return page.write(out, make_page(folder, found, out.parent))


def _folders(folder: Path, deep: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir() or path.name.startswith("."):
            continue
        if (path / "config.yaml").is_file():
            yield path
        elif deep > 1 and path.name not in _ELSEWHERE:
            yield from _folders(path, deep - 1)


def _listed(path: Path) -> Listed:
    kind, date = "run", ""
    try:
        date = fmt.date(path)
        kind = kind_of(path) or kind
        return _run(path, date) if kind == "run" else _study(path, kind, date)
    except (*TROUBLE, KeyError, TypeError, AttributeError) as error:  # whatever is in there
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason.replace(f"{path.resolve()}/", "").replace(f"{path}/", "")
        return Listed(path, kind, date, reason, problem=True)


def _run(path: Path, date: str) -> Listed:
    found = Found(RunDirectory.open(path))
    experiment, rounds = found.run.experiment, found.rounds
    done, wanted = len(rounds), experiment.rounds
    complete = bool(found.summary) and found.run.is_over
    sizes = {event.round: 0 for event in rounds}
    for message in found.messages:
        if message.round in sizes and message.phase != "evaluate":
            sizes[message.round] += message.up + message.down
    sent = list(accumulate(sizes.values()))
    student, ensemble = found.accuracy("student"), found.accuracy("ensemble")
    losses = fmt.objective((term.name, term.weight) for term in experiment.distillation.losses)
    rules = " → ".join(rule.name for rule in experiment.fusion)
    return Listed(
        path,
        "run",
        date,
        "complete" if complete else f"{done} of {fmt.count(wanted, 'round')}",
        accuracy=Cell(fmt.percent(student), fmt.counted(student, found.tested), strong=True),
        about=f"{experiment.data.dataset.name}, {experiment.student.model.name}, {rules}, {losses}",
        cells=(
            fmt.percent(ensemble),
            str(done),
            fmt.human_bytes(sent[-1]) if sent else fmt.DASH,
            fmt.duration(found.summary.get("seconds", {}).get("total")),
        ),
        curve=([e.round for e in rounds], [e.student.accuracy for e in rounds],
               [size / 1e6 for size in sent]) if rounds else None,
        config=flat(experiment.model_dump(mode="json", exclude={"output"})),
    )  # fmt: skip


def _study(path: Path, kind: str, date: str) -> Listed:
    results = read_json(path / RESULTS, dict[str, Any]) or {}
    # Rows of comparisons and methods of `distill` with their mean over seeds.
    rows = results.get("rows") or results.get("methods") or {}
    known = {
        name: value
        for name, row in rows.items()
        if (value := row.get("final") or row.get("last")) and "mean" in value
    }
    best = max(known, key=lambda name: known[name]["mean"], default=None)
    failed = len(results.get("errors", {}))
    state = "complete" if results.get("finished") else "not complete"
    return Listed(
        path,
        kind,
        date,
        f"{state}, {failed} failed" if failed else state,
        accuracy=""
        if best is None
        else Cell(fmt.spread(known[best], unit=" %"), f"{best}, {known[best].get('n', 1)} seeds"),
        about=f"{fmt.count(len(rows), 'row')}, {fmt.seeds(results.get('seeds') or [0])}",
        config=flat(read_yaml(path / "config.yaml")),
    )


def make_page(folder: Path, found: Sequence[Listed], place: Path) -> Page:
    """Everything on the page.

    Args:
        folder: What is looked at.
        found: Newest first.
        place: Folder of the page, from where links lead.
    """
    labels = [f"{n} {fmt.short(_name(each), 22)}" for n, each in enumerate(found, start=1)]
    drawn = [(label, each.curve) for label, each in zip(labels, found) if each.curve][:_CURVES]
    shown = {label for label, _ in drawn}
    runs = sum(each.kind == "run" for each in found)
    damaged = sum(each.problem for each in found)
    columns = [
        *numbers("#"), Column("name", look="first"), *numbers("student, %"),
        *words("state", "kind", "about"), *numbers("ensemble", "rounds", "bytes", "time"),
        Column("began", look="name"),
    ]  # fmt: skip
    rows = []
    for number, (label, each) in enumerate(zip(labels, found), start=1):
        name = _name(each)
        about = str(each.path.relative_to(folder))
        at = each.path / REPORT
        link = os.path.relpath(at, place).replace(os.sep, "/") if at.is_file() else ""
        state = Cell(each.state, look="soft" if each.state == "complete" else "")
        cells: list[str | Cell] = [
            str(number),
            Cell(name, about, link=link),
            each.accuracy,
            state,
            each.kind,
        ]
        rows.append(
            Row([*cells, each.about, *each.cells, each.date],
                look="soft" if each.problem else "", series=label if label in shown else "")
        )  # fmt: skip
    sections = [
        Section("runs", "Runs", [Card("", _TABLE, table=Table(columns, rows))]),
        Section("curves", "Curves", _curves(drawn)),
        Section("configs", "Configs", [Card("", _CONFIGS, configs=_apart(labels, found))]),
    ]
    return Page(
        title=folder.resolve().name,
        sentence=f"{fmt.count(runs, 'run')} and {len(found) - runs} studies, newest first."
        + (f" {damaged} of them cannot be read: their state says why." if damaged else ""),
        sections=sections,
        footer=f"fedkd view {folder.resolve().name}",
    )


_TABLE = (
    "A name leads to its page. A tick shows a run's curves below. Student: test accuracy after the "
    "last round, with its 95 % interval and how many images it is counted on; of a study its best "
    "row, mean ± sample deviation over seeds. Bytes: both ways, all clients, without what only "
    "measures."
)
_CONFIGS = "Keys whose values differ between the two."


def _name(each: Listed) -> str:
    stem = each.path.name.rsplit("-", 3)
    return stem[0] if len(stem) == 4 and stem[1].isdigit() else each.path.name


def _curves(drawn: Sequence[tuple[str, tuple[list[int], list[float], list[float]]]]) -> list[Card]:
    if not drawn:
        return []
    colors, markers = drawing.COLORS, drawing.MARKERS
    over_rounds, over_bytes = [], []
    for place, (label, (rounds, accuracy, sent)) in enumerate(drawn):
        look: drawing.Look = {
            "color": colors[place % len(colors)],
            "marker": markers[place % len(markers)],
            "ls": ("-", "--", ":", "-.")[place // len(colors) % 4],
        }
        over_rounds.append(drawing.Line(label, rounds, [accuracy], look))
        over_bytes.append(drawing.Line(label, sent, [accuracy], look))
    per_round, per_byte = drawing.curves(over_rounds, "round"), drawing.curves(over_bytes, "MB")
    per_round.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if max(max(sent) for _, (_, _, sent) in drawn) > 0:
        per_byte.axes[0].set_xscale("log")
        per_byte.axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    many = f" The newest {_CURVES} runs can be shown." if len(drawn) == _CURVES else ""
    text = f"Test accuracy of each run's student.{many}"
    other = "The same over megabytes so far, both ways, on a logarithmic scale."
    return [
        Card("Accuracy per round", text, [per_round], first=_SHOWN),
        Card("Accuracy per MB", other, [per_byte], first=_SHOWN),
    ]


def _apart(labels: Sequence[str], found: Sequence[Listed]) -> dict[str, dict[str, Any]]:
    """Label -> the config's values whose keys not all have alike."""
    configs = {label: each.config for label, each in zip(labels, found) if each.config}
    keys = sorted({key for config in configs.values() for key in config})
    apart = [key for key in keys if len({str(config.get(key)) for config in configs.values()}) > 1]
    return {
        label: {key: config[key] for key in apart if key in config}
        for label, config in configs.items()
    }
