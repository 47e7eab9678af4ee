"""A study of methods as a page and a table; also of one that is under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from fedkd.build import build_domains
from fedkd.io.records import read_json
from fedkd.reporting import costs, page
from fedkd.reporting import format as fmt
from fedkd.reporting.costs import Line
from fedkd.reporting.domain_table import CAPTION, Judged, domain_table
from fedkd.reporting.format import seeds
from fedkd.reporting.heads import CAPTION as HEADS
from fedkd.reporting.heads import Answering, heads_table
from fedkd.reporting.noisy import noisy_cards
from fedkd.reporting.page import Card, Page, Section, Tile
from fedkd.reporting.run_figures import training_figures
from fedkd.reporting.table import Cell, Column, Row, Table, numbers
from fedkd.studies.central.config import BASELINE, DistillConfig
from fedkd.studies.central.figures import curves_figure, methods_figure
from fedkd.studies.central.folder import Place
from fedkd.studies.engine import REPORT, Record

_TABLE = (
    "Test accuracy in percent, mean ± sample standard deviation over seeds. The last epoch "
    "involves no choice. The best epoch is each run's best test accuracy, so it is chosen on the "
    "test set: published tables do the same, and it flatters. The gain has its 95 % confidence "
    "interval (paired by seed, Student's t). The share of the gap is the gain over the student "
    "alone, divided by the teacher's lead over it. ECE: expected calibration error after the last "
    "epoch; scaled, of logits divided by a temperature that is found on training images that are "
    "left over, where there are any: predictions use it. Images per second and training "
    "time are one network's, without evaluation; a method with assistants trains them besides."
)
_ECE = {"ece": "ECE, %", "ece_scaled": "ECE scaled, %"}
_CURVES = (
    "Test accuracy per epoch: the method in blue (mean, and from lowest to highest seed), the "
    "student alone in grey, the best teacher as a line."
)
_TERMS = (
    "Each term before its weight. The pull is the length of the weighted term's gradient on the "
    "student, in the first batch of every epoch, as a share of all: a term with a sliver does not "
    "steer, whatever its loss shows."
)

_COSTS = (
    "Time and energy are those of training one network, without evaluation: means over seeds. "
    "With --jobs, energy counts what was trained beside it."
)


def write_report(config: DistillConfig, folder: Path, found: Record) -> Path:
    """Write `report.html` into the study's folder and return its path."""
    return page.write(folder / REPORT, make_page(config, folder, found))


def make_page(study: DistillConfig, folder: Path, found: Record) -> Page:
    """Everything on the page."""
    total = len(study.seeds) * len(found["methods"])
    done = sum(len(row["seeds"]) for row in found["methods"].values())
    tried = [(n, r) for n, r in _ranked(found) if n != BASELINE and r["last"] is not None]
    details = [
        card for name in found["methods"] if (card := _details(study, folder, name)) is not None
    ]
    if details:
        details.append(Card(caption=_TERMS))
    curves = _curves(study, folder, found)
    sections = [
        Section("results", "Results", [Card("", _TABLE, table=methods_table(found)),
                                       _overview(found)]),
        Section("heads", "Heads", _heads(found)),
        Section("domains", "Domains", _domains(study, found)),
        Section("curves", "Learning curves", [
            Card("", _CURVES, [curves]) if curves else Card("", "No epoch has finished yet."),
        ]),
        Section("terms", "Losses", details),
        Section("labels", "Labels that may be wrong", _labels(study, folder)),
        Section("costs", "Costs", [_costs(found)]),
        page.config_section(folder, read_json(folder / "versions.json", dict[str, str]), "distill"),
    ]  # fmt: skip
    return Page(
        title=study.name,
        sentence=_sentence(study, found),
        sections=sections,
        footer=folder.name,
        remarks=[seeds(study.seeds), fmt.date(folder)],
        headline=(fmt.spread(tried[0][1]["last"], unit=" %"),
                  f"{tried[0][0]}, last epoch, {seeds([*map(int, tried[0][1]['seeds'])])}")
        if tried
        else None,
        tiles=_tiles(found),
        **page.progress(found, f"{done} of {fmt.count(total, 'student')}"),
    )  # fmt: skip


def _alone(found: Record) -> str:
    """What the row without a teacher is called."""
    rows = (*found["teachers"], *found["methods"].values())
    domains = any("sources" in row for row in rows)
    return "student with the target's labels" if domains else "student alone"


def _domains(study: DistillConfig, found: Record) -> list[Card]:
    """Who is how good in which domain."""
    given = study.experiment.data.domains
    if given is None:
        return []
    shifts = build_domains(given, "experiment.data.domains")
    rows = [
        Judged(
            f"teacher {place}",
            row["last"],
            row.get("sources", {}),
            str(shifts.sources[shifts.number_of(place)]),
            row["model"],
            "ensemble",
        )
        for place, row in enumerate(found["teachers"])
    ]
    rows += [
        Judged(
            _alone(found) if name == BASELINE else name,
            row["last"],
            row.get("sources", {}),
            note=fmt.objective((term["name"], term["weight"]) for term in row["losses"]),
            key="teacher" if name == BASELINE else "student",
        )
        for name, row in _ranked(found)
    ]
    table = domain_table(str(shifts.target), [str(shift) for shift in shifts.sources], rows)
    return [Card("", CAPTION, table=table)]


def _heads(found: Record) -> list[Card]:
    """How good each head is."""
    if not (heads := found.get("heads")):
        return []
    rows = [
        Answering(f"teacher {place}", row["model"], row.get("heads", {}), "ensemble")
        for place, row in enumerate(found["teachers"])
    ]
    for name, row in _ranked(found):
        about = fmt.objective((term["name"], term["weight"]) for term in row["losses"])
        who, key = (_alone(found), "teacher") if name == BASELINE else (name, "student")
        rows.append(Answering(who, about, row.get("heads", {}), key))
    return [Card("", HEADS, table=heads_table(heads, rows))]


def methods_table(found: Record) -> Table:
    """Teachers and methods, best first."""
    everybody = (*found["teachers"], *found["methods"].values())
    eces = [key for key in _ECE if any(row.get(key) for row in everybody)]
    columns = [
        Column("method", look="first"), Column("losses", on="console"),
        *numbers("last epoch, %"),
        *numbers("over student", "share of the gap", on="page"),
        *numbers(*(_ECE[key] for key in eces), look="soft", on="page"),
        *numbers("best epoch, %", "seeds", "images/s", look="soft"),
        *numbers("training", look="soft", on="page"),
    ]  # fmt: skip
    rows = []
    for place, row in enumerate(found["teachers"]):
        name = f"teacher {place}" if len(found["teachers"]) > 1 else "teacher"
        size = f", {fmt.count(row['parameters'], 'parameter')}" if row["parameters"] else ""
        source = f"read from {row['source']}" if row["source"] else "trained here"
        source += f", sees {row['modality']}" if "modality" in row else ""
        first = Cell(name, f"{row['model']}{size}, {source}")
        rows.append(Row([first, row["model"], *_numbers(row, eces)], key="ensemble"))
    for place, (name, row) in enumerate(_ranked(found)):
        alone = name == BASELINE
        losses = fmt.objective((term["name"], term["weight"]) for term in row["losses"])
        about = "cross entropy, no teacher" if alone and losses == "ce" else losses
        if row["assistants"]:
            way = (
                "each from all before it"
                if row["assistant_mode"] == "dgkd"
                else "each from the last"
            )
            about += f"; by way of {', '.join(row['assistants'])}, {way}"
        losses += "".join(f" via {model}" for model in row["assistants"])
        first = Cell(_alone(found) if alone else name, about, strong=not alone)
        if row["generations"]:
            each = " → ".join(fmt.spread(value) for value in row["generations"])
            about += f"; {len(row['generations'])} generations: {each} %"
        cells = _numbers(row, eces, *_gain(name, row, found), seeds=str(len(row["seeds"])))
        look, key = ("soft", "teacher") if alone else ("", "student")
        rows.append(Row([first, losses, *cells], key, look, begins=place == 0))
    together = [(name, row) for name, row in _ranked(found) if row["ensemble"] is not None]
    for place, (name, row) in enumerate(together):
        about = "mean of the probabilities of its generations"
        first = Cell(f"{name}, {len(row['generations'])} together", about)
        whole = {"last": row["ensemble"], "best": None, "images_per_second": None, "seconds": None}
        rows.append(Row([first, about, *_numbers(whole, eces)], "ensemble", "", begins=place == 0))
    return Table(
        columns, rows,
        f"{found['name']} · {found['student']} on {found['dataset']}{fmt.tested(found['tests'])}",
        "mean ± sample deviation; the best epoch is chosen on the test set, as published tables do",
    )  # fmt: skip


def _ranked(found: Record) -> list[tuple[str, Record]]:
    def last(item: tuple[str, Record]) -> float:
        return float((item[1]["last"] or {"mean": -1.0})["mean"])

    return sorted(found["methods"].items(), key=last, reverse=True)


def _numbers(
    row: Record,
    eces: Sequence[str],
    gain: str | Cell = "",
    share: str = "",
    seeds: str = "",
) -> list[str | Cell]:
    speed, spent = fmt.number(row["images_per_second"]), fmt.duration(row["seconds"])
    last, best = fmt.spread(row["last"]), fmt.spread(row["best"])
    off = [fmt.spread(row.get(key), 1) for key in eces]
    return [Cell(last, strong=True), gain, share, *off, best, seeds, speed, spent]


def _gain(name: str, row: Record, found: Record) -> tuple[str | Cell, str]:
    """Points over the student alone, pale if chance does as much; share of the teachers' lead."""
    alone = found["methods"][BASELINE]
    if name == BASELINE or not alone["last"] or not row["last"]:
        return "", ""
    difference = row["last"]["mean"] - alone["last"]["mean"]
    gap, chance = fmt.gap(_gains(row, alone), difference)
    gain = Cell(gap, look="soft" if chance else "")
    lead = max(_finished_teachers(found), default=0.0) - alone["last"]["mean"]
    share = fmt.percent(difference / lead, 0).replace("-", fmt.MINUS) if lead > 0.002 else fmt.DASH
    return gain, share


def _gains(row: Record, alone: Record) -> list[float]:
    return [
        result["last"] - alone["seeds"][seed]["last"]
        for seed, result in row["seeds"].items()
        if seed in alone["seeds"]
    ]


def _finished_teachers(found: Record) -> list[float]:
    return [row["last"]["mean"] for row in found["teachers"] if row["last"] is not None]


def _sentence(study: DistillConfig, found: Record) -> str:
    teachers = " and ".join(row["model"] for row in found["teachers"])
    if (shifts := study.experiment.data.domains) is not None:
        sources = ", ".join(shift.name for shift in shifts.sources)
        teachers += f", of which each knows one domain ({sources}),"
    recipe, noise = study.experiment.distillation, study.experiment.data.label_noise
    students = [row for method in found["methods"].values() for row in method["seeds"].values()]
    wrong = next((row["wrong_labels"] for row in students if "wrong_labels" in row), None)
    about = ""
    if shifts is not None:
        about = f" The images that it learns on are of another domain ({shifts.target.name})."
    if noise is not None:
        share = fmt.DASH if wrong is None else fmt.percent(wrong)
        about += f" Of the labels that it learns from {share} are wrong ({noise.kind} noise)."
    return (
        f"One {found['student']} learns from {teachers} on {found['dataset']} by "
        f"{fmt.count(len(found['methods']) - 1, 'method')}, and alone. "
        f"{fmt.count(recipe.epochs, 'epoch')}, batches "
        f"of {recipe.batch_size}, {recipe.optimizer.name} at {recipe.optimizer.lr:g}, "
        f"{recipe.augment}, {recipe.precision}; methods that change this differ.{about}"
    )


def _tiles(found: Record) -> list[Tile]:
    tiles = []
    taught = [row for row in found["teachers"] if row["last"] is not None]
    if taught:
        top = max(taught, key=lambda row: row["last"]["mean"])
        size = fmt.count(top["parameters"], "parameter")
        tiles.append(Tile("best teacher", fmt.percent(top["last"]["mean"], 2), size))
    alone = found["methods"][BASELINE]
    if alone["last"] is not None:
        size = fmt.count(alone["parameters"], "parameter")
        tiles.append(Tile("student alone", fmt.percent(alone["last"]["mean"], 2), size))
    tried = [row for name, row in found["methods"].items() if name != BASELINE]
    known = [row["last"]["mean"] for row in (alone, *tried) if row["last"] is not None]
    gains = [gain for row in tried if len(gain := _gains(row, alone)) > 1]
    if gains:
        sure = sum(mean - half > 0 for mean, half in map(fmt.confidence, gains))
        about = f"95 % interval of the gain above 0, {seeds(list(alone['seeds']))}"
        tiles.append(Tile("methods that surely help", f"{sure} of {len(gains)}", about))
    tiles += page.size_tile(found["tests"], max(known, default=None))
    spent = sum(r["seconds"] for row in found["methods"].values() for r in row["seeds"].values())
    if spent:
        tiles.append(Tile("training of students", fmt.duration(spent), "without evaluation"))
    return tiles


def _costs(found: Record) -> Card:
    lines = [
        Line(f"teacher {row['model']}", "" if row["seconds"] else "read from a file", row, row,
             "ensemble")
        for row in found["teachers"]
    ]  # fmt: skip
    for name, row in _ranked(found):
        alone = name == BASELINE
        who, key = ("student alone", "teacher") if alone else (name, "student")
        note = f"besides {', '.join(row['assistants'])}" if row["assistants"] else ""
        lines.append(Line(who, note, row, row, key))
    text = f"{costs.caption(found['energy'])} {_COSTS}"
    return Card("", text, table=costs.costs_table(lines, found["energy"]))


def _overview(found: Record) -> Card:
    title = "Methods between student and teacher"
    finished = {name: row for name, row in found["methods"].items() if row["last"] is not None}
    if not finished:
        return Card(title, "No student has finished yet.")
    last, best = (
        {name: [r[key] for r in row["seeds"].values()] for name, row in finished.items()}
        for key in ("last", "best")
    )
    many = len(found["teachers"]) > 1
    teachers = {
        f"teacher {place} ({row['model']})" if many else f"teacher ({row['model']})": row["last"][
            "mean"
        ]
        for place, row in enumerate(found["teachers"])
        if row["last"] is not None
    }
    return Card(title, figures=[methods_figure(last, best, BASELINE, teachers)])


def _curves(study: DistillConfig, folder: Path, found: Record) -> Figure | None:
    curves = {}
    for name in found["methods"]:
        students = [Place.of_student(folder, name, seed).epochs() for seed in study.seeds]
        lines = [
            {epoch["epoch"]: epoch["accuracy"] for epoch in epochs if epoch["accuracy"] is not None}
            for epochs in students
        ]
        if any(lines):
            curves[name] = [line for line in lines if line]
    if not curves:
        return None
    return curves_figure(curves, BASELINE, max(_finished_teachers(found), default=None))


def _labels(study: DistillConfig, folder: Path) -> list[Card]:
    """What became of them in the trainings that expect some to be wrong."""
    teachers, found = study.experiment.teachers, []
    if teachers.noisy is not None:
        each = study.seeds if teachers.per_seed else (None,)
        places = {
            f"teacher {number}" + ("" if seed is None else f", seed {seed}"): Place.of_teacher(
                folder, number, seed
            )
            for number in range(len(teachers.models))
            for seed in each
        }
        found.append(("teachers", teachers.noisy, places))
    for name, run in study.runs().items():
        if run.distillation.noisy is not None:
            places = {
                f"{name}, seed {seed}": Place.of_student(folder, name, seed) for seed in study.seeds
            }
            found.append((name, run.distillation.noisy, places))
    cards: list[Card] = []
    for name, noisy, places in found:
        curves = {
            who: [epoch["noisy"] for epoch in place.epochs()] for who, place in places.items()
        }
        made = noisy_cards(noisy, curves, "training")
        cards += [replace(card, title=f"{name}: {card.title}") if card.title else card
                  for card in made]  # fmt: skip
    return cards


def _details(study: DistillConfig, folder: Path, name: str) -> Card | None:
    """Terms and gradients of a method's first seed; None for what has a single loss."""
    losses = study.runs()[name].distillation.losses
    seed = study.seeds[0]
    epochs = Place.of_student(folder, name, seed).epochs()
    if not epochs or (name == BASELINE and len(losses) == 1):
        return None
    sums, terms, gradients = (
        [epoch[key] for epoch in epochs] for key in ("loss", "terms", "gradients")
    )
    drawn = training_figures(sums, terms, gradients, [1] * len(epochs), losses)
    names = dict.fromkeys(term for epoch in epochs for term in epoch["terms"])
    few = len(study.runs()) <= 5
    title = f"{name} · seed {seed}"
    return Card(title, "", drawn, wide=False, fold=", ".join(names), open=few)
