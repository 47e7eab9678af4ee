"""A run as one HTML page that needs nothing else: no network, no scripts, no other files.

Works for a run that has finished, is under way or has failed: what is not there is named.
"""

from __future__ import annotations

import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from fedkd import plots
from fedkd.build import build_data
from fedkd.data.picture import partition_picture
from fedkd.data.splits import FederatedData
from fedkd.insight import Relations, likeness, relations
from fedkd.knowledge.store import write_atomically
from fedkd.page import PAGE
from fedkd.privacy.statement import statement
from fedkd.rundir import RunDirectory

logger = logging.getLogger(__name__)

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

Record = dict[str, Any]
# What can go wrong while reading data or knowledge again; the page then says what is missing.
_TROUBLE = (OSError, ValueError, RuntimeError, ImportError)
_MANY = 16  # longer tables are folded up
_REFUSED_SHOWN = 300


@dataclass(frozen=True)
class Card:
    """One picture with what to see in it.

    Attributes:
        title: Heading.
        caption: One sentence or two: what the picture shows and what to look for.
        picture: Inline SVG; None if there is nothing to draw, then the caption says why.
        wide: Takes the whole width.
    """

    title: str
    caption: str
    picture: Markup | None = None
    wide: bool = False
    lone: bool = False  # has no neighbour: the caption takes the place beside the picture


@dataclass
class _Run:
    """Everything the page is made of, read once."""

    run: RunDirectory
    rounds: list[Record]
    epochs: list[Record]
    refused: list[Record]
    verdicts: dict[int, float]
    ledger: list[Record]
    summary: Record
    data: FederatedData | None = None
    data_problem: str | None = None
    pictures: int = field(default=0)

    @classmethod
    def read(cls, run: RunDirectory) -> _Run:
        data, problem = None, None
        try:
            data = build_data(run.experiment)
        except _TROUBLE as error:
            problem = str(error)
            logger.warning("report of %s without pictures of the data: %s", run.identity, problem)
        verdicts = {
            r["client"]: r["holdout_right"] / r["holdout_total"]
            for r in run.metrics("client")
            if r.get("phase") == "evaluate" and r.get("holdout_total")
        }
        return cls(
            run,
            run.metrics("round"),
            run.metrics("epoch"),
            run.metrics("refused"),
            verdicts,
            run.ledger_entries(),
            run.read_json("summary.json") or {},
            data,
            problem,
        )

    @property
    def last(self) -> Record:
        """The last finished round, or nothing."""
        return self.rounds[-1] if self.rounds else {}

    @property
    def classes(self) -> list[str]:
        """Class names; numbers where only their count is known."""
        if self.data is not None:
            return list(self.data.classes)
        if "classes" in self.summary:
            return list(self.summary["classes"])
        return [str(c) for c in range(len(self.last.get("student", {}).get("per_class", [])))]

    @property
    def class_counts(self) -> np.ndarray | None:
        """Private images per client and class; None where they are unknown, or protected."""
        if self.run.experiment.promises:
            return None
        if self.data is not None:
            return self.data.class_counts().numpy()
        counts = self.summary.get("class_counts")
        return None if counts is None else np.asarray(counts)

    @property
    def transfer(self) -> Record:
        """Size and bytes of the transfer set, as far as known."""
        if "transfer" in self.summary:
            return dict(self.summary["transfer"])
        if self.data is None:
            options = self.run.experiment.data.transfer
            return {"size": options.size, "labelled": options.labelled, "bytes": None}
        images = self.data.transfer.images.images
        labelled = self.data.transfer.labelled
        return {"size": len(images), "labelled": labelled, "bytes": images.numel()}

    def draw(self, make: Callable[..., Figure], *args: Any, **options: Any) -> Markup:
        """A picture, ready for the page."""
        self.pictures += 1
        return Markup(plots.svg(make(*args, **options), f"picture{self.pictures}"))


def write_report(run: RunDirectory) -> Path:
    """Write `report.html` into the run's folder and return its path.

    The same run gives the same bytes. Parts that need the images are left out, and said to be,
    where the images cannot be loaded.
    """
    page = render(run)
    path = run.path / "report.html"
    write_atomically(path, page.encode("utf-8"))
    return path


def render(run: RunDirectory) -> str:
    """The page as text."""
    found = _Run.read(run)
    with plots.style():
        agree, *graphs = _relations(found)
        learning = [_losses(found), _pulls(found), _calibration(found)]
        sections: list[tuple[str, str, Sequence[Card | None]]] = [
            ("accuracy", "Accuracy", [_accuracy(found), _classes(found)]),
            ("learning", "What the student learnt from", learning),
            ("clients", "Clients and their teachers", [_partition(found), agree]),
            ("relations", "What relations the student has taken over", graphs),
            ("costs", "Bytes and time", [_traffic(found), _cost(found), _time(found)]),
        ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "bytes": human_bytes,
        "bar": _bar,
        "known": _or_dash,
    }
    warnings = dict.fromkeys(r.get("text", "") for r in run.metrics("warning"))
    return environment.from_string(PAGE).render(
        experiment=run.experiment,
        identity=run.identity,
        date=_date(run),
        state=_state(found),
        sentence=_sentence(found),
        tiles=_tiles(found),
        headline=_headline(found),
        teachers=_teachers(found),
        many=_MANY,
        sections=[
            (key, title, _pair(cards, more=key == "costs" and bool(found.ledger)))
            for key, title, cards in sections
        ],
        privacy=_privacy(found),
        traffic=_traffic_tables(found),
        refused=found.refused[:_REFUSED_SHOWN],
        refused_more=max(0, len(found.refused) - _REFUSED_SHOWN),
        warnings=list(warnings),
        asked=bool(found.ledger),
        data_problem=found.data_problem,
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        versions=run.read_json("versions.json") or {},
        hash=found.last.get("hash"),
    )


def _pair(cards: Sequence[Card | None], *, more: bool) -> list[Card]:
    """The cards there are; one that would stand beside a hole is spread over the width.

    Args:
        cards: None stands for one that this run has no numbers for.
        more: A card of half the width follows in the page itself.
    """
    there = [card for card in cards if card is not None]
    halves = [number for number, card in enumerate(there) if not card.wide]
    if halves and (len(halves) + more) % 2:
        there[halves[-1]] = replace(there[halves[-1]], lone=True)
    return there


# -- the top -------------------------------------------------------------------------------------


def _state(found: _Run) -> Record:
    done, wanted = len(found.rounds), found.run.experiment.rounds
    degraded = [r["round"] for r in found.rounds if r.get("status", "ok") != "ok"]
    if found.summary and done >= wanted:
        kind, text = "complete", f"complete · {_count(done, 'round')}"
    elif done:
        kind, text = "partial", f"not complete · {done} of {_count(wanted, 'round')} so far"
    else:
        kind, text = "partial", f"no round of {wanted} has finished yet"
    return {"kind": kind, "text": text, "degraded": degraded}


def _sentence(found: _Run) -> str:
    experiment, transfer = found.run.experiment, found.transfer
    images = f"{'labelled' if transfer['labelled'] else 'unlabelled'} images"
    losses = " + ".join(
        f"{term.weight:g} {TIMES} {term.name}" if term.weight != 1 else term.name
        for term in experiment.distillation.losses
    )
    fusion = " → ".join(rule.name for rule in experiment.fusion)
    models = dict.fromkeys(model.name for model in experiment.teachers.models)
    return (
        f"One {experiment.student.model.name} student learns from {experiment.clients} private "
        f"teachers ({', '.join(models)}), who say what they think of {transfer['size']:,} common "
        f"{images} and never show their own. Fusion {fusion}; objective {losses}."
    )


def _tiles(found: _Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of a few numbers worth a glance, after the student's accuracy."""
    last, tiles = found.last, []
    student = last.get("student", {}).get("accuracy")
    ensemble = (last.get("ensemble") or {}).get("accuracy")
    if ensemble is not None:
        gap = f"student {_points(student - ensemble)}" if student is not None else ""
        tiles.append(("teacher ensemble", percent(ensemble), gap))
    known = _known(last.get("teachers", {}).values())
    if known:
        middle = statistics.median(known)
        gap = f"student {_points(student - middle)}" if student is not None else ""
        tiles.append(("median teacher", percent(middle), gap))
    sent = sum(e["up"] for e in found.ledger if e["phase"] == "knowledge")
    if sent:
        rounds = len({e["round"] for e in found.ledger if e["phase"] == "knowledge"})
        per = sent / max(1, rounds * found.run.experiment.clients)
        tiles.append(("knowledge sent", human_bytes(sent), f"{human_bytes(per)} per client, round"))
    seconds = found.summary.get("seconds", {}).get("total")
    if seconds is None and found.rounds:
        seconds = sum(sum(r.get("seconds", {}).values()) for r in found.rounds)
    if seconds:
        tiles.append(("time", _duration(seconds), f"{_count(len(found.rounds), 'round')}"))
    return tiles


def _headline(found: _Run) -> list[Record]:
    """Rows of the first table: who, learnt from what, how good."""
    experiment, summary, last = found.run.experiment, found.summary, found.last
    model = experiment.student.model.name
    size = found.transfer["size"]
    parameters = summary.get("student", {}).get("parameters")
    rows = []

    def row(kind: str, name: str, model: str, source: str, value: float | None) -> None:
        rows.append({"kind": kind, "name": name, "model": model, "from": source, "value": value})

    taught = f"what {experiment.clients} teachers say about {size:,} images"
    shown = f"{model} ({parameters:,} parameters)" if parameters else model
    row("student", "student", shown, taught, last.get("student", {}).get("accuracy"))
    best = summary.get("student", {})
    if best.get("best_accuracy", 0) > best.get("accuracy", math.inf):
        source = f"the same, after round {best['best_round']}"
        row("minor", "student at its best", "", source, best["best_accuracy"])
    if last.get("ensemble"):
        row("ensemble", "ensemble", "all teachers, fused", "", last["ensemble"]["accuracy"])
    known = _known(last.get("teachers", {}).values())
    if known:
        row("teacher", "best teacher", "", "its own private images", max(known))
        row("teacher", "median teacher", "", "its own private images", statistics.median(known))
    if last.get("pseudo_labels") is not None:
        source = "ensemble on the transfer set, against its hidden labels"
        row("pseudo", "pseudo-labels", "", source, last["pseudo_labels"])
    if summary.get("oracle") is not None:
        source = f"{size:,} transfer images with their true labels"
        row("oracle", "oracle", model, source, summary["oracle"])
    if summary.get("ceiling") is not None:
        source = "all private images in one place"
        if found.class_counts is not None:
            source = f"all {int(found.class_counts.sum()):,} private images in one place"
        row("ceiling", "ceiling", model, source, summary["ceiling"])
    if found.verdicts:
        client = min(found.verdicts, key=lambda c: (found.verdicts[c], c))
        source = f"student on the held-out images of client {client}"
        row("worst", "worst client", "", source, found.verdicts[client])
    return rows


def _teachers(found: _Run) -> list[Record]:
    counts, scores = found.class_counts, found.last.get("teachers", {})
    rows = []
    for client in range(found.run.experiment.clients):
        held = None if counts is None or client >= len(counts) else counts[client]
        rows.append(
            {
                "client": client,
                "model": found.run.experiment.teachers.model_of(client).name,
                "images": None if held is None else int(held.sum()),
                "classes": None if held is None else int((held > 0).sum()),
                "accuracy": scores.get(str(client)),
                "holdout": found.verdicts.get(client),
            }
        )
    return rows


# -- pictures ------------------------------------------------------------------------------------


def _accuracy(found: _Run) -> Card:
    title = "Test accuracy per round"
    if not found.rounds:
        return Card(title, "No round has finished, so there is nothing to draw yet.")
    numbers = [r["round"] for r in found.rounds]
    lines = {
        "student": [_score(r, "student") for r in found.rounds],
        "ensemble": [_score(r, "ensemble") for r in found.rounds],
        "pseudo-labels": [_number(r.get("pseudo_labels")) for r in found.rounds],
    }
    clients = sorted({int(c) for r in found.rounds for c in r.get("teachers", {})})
    teachers = {
        c: [_number(r.get("teachers", {}).get(str(c))) for r in found.rounds] for c in clients
    }
    levels = {n: found.summary[n] for n in ("oracle", "ceiling") if found.summary.get(n)}
    caption = (
        "The student (blue) should rise above the single teachers (grey) towards their ensemble "
        "(orange). "
    )
    if levels:
        caption += (
            "The oracle learnt from the transfer set's true labels, the ceiling from all private "
            "images: neither exists in a real federation. "
        )
    if np.isfinite(lines["pseudo-labels"]).any():
        caption += "Pseudo-labels are judged on the transfer set, everything else on test images."
    picture = found.draw(plots.accuracy_picture, numbers, lines, teachers, levels)
    return Card(title, caption.strip(), picture)


def _classes(found: _Run) -> Card | None:
    scores = {
        name: found.last[name]["per_class"]
        for name in ("student", "ensemble")
        if (found.last.get(name) or {}).get("per_class")
    }
    if not scores:
        return None
    classes, counts = found.classes, found.class_counts
    held = None if counts is None else [int(n) for n in (counts > 0).sum(axis=0)]
    caption = "Accuracy within each class after the last round. "
    if len(classes) > 20:
        caption += "Pale is good; a class dark in both rows is one the teachers do not know. "
    else:
        caption += "Where both bars are short, the teachers do not know the class. "
        if held:
            caption += "The numbers at the right say how many clients hold the class. "
    caption += _losers(classes, scores)
    picture = found.draw(plots.class_picture, classes, scores, held)
    return Card("Accuracy per class", caption, picture, wide=len(classes) > 20)


def _losers(classes: Sequence[str], scores: Mapping[str, Sequence[float]]) -> str:
    if len(scores) < 2:
        return ""
    gaps = np.asarray(scores["student"], dtype=float) - np.asarray(scores["ensemble"], dtype=float)
    worst = [int(c) for c in np.argsort(gaps, kind="stable")[:3] if gaps[c] < -0.005]
    if not worst:
        return "The student loses nothing to the ensemble in any class."
    listed = ", ".join(f"'{plots.short(classes[c], 24)}' ({_points(gaps[c])})" for c in worst)
    return f"It loses most to the ensemble in {listed}."


def _losses(found: _Run) -> Card:
    title = "Loss terms per epoch"
    if not found.epochs:
        return Card(title, "The student has not trained for an epoch yet.")
    names = list(dict.fromkeys(name for e in found.epochs for name in e["terms"]))
    terms = {"total": [_number(e["loss"]) for e in found.epochs]} if len(names) != 1 else {}
    for name in names:
        terms[name] = [_number(e["terms"].get(name)) for e in found.epochs]
    weights: dict[str, float] = {}
    configured = found.run.experiment.distillation.losses
    if len(configured) == len(names):
        weights = {n: t.weight for n, t in zip(names, configured, strict=True) if t.weight != 1}
    picture = found.draw(plots.loss_picture, terms, [e["round"] for e in found.epochs], weights)
    return Card(
        title,
        "Each term before its weight; a step up at a dotted line is a new round with new teachers "
        "and a fresh learning-rate schedule. The terms count different things: compare shapes, "
        "not heights.",
        picture,
    )


def _pulls(found: _Run) -> Card | None:
    known = [e for e in found.epochs if e.get("gradients")]
    if not known:
        return None
    names = list(dict.fromkeys(name for e in known for name in e["gradients"]))
    pulls = {name: [_number(e["gradients"].get(name)) for e in known] for name in names}
    picture = found.draw(plots.pull_picture, pulls, [e["round"] for e in known])
    return Card(
        "Who pulls how hard",
        "Length of each weighted term's gradient on the student, in the first batch of every "
        "epoch, as a share of all. A term with a sliver here does not steer the student, whatever "
        "its loss says.",
        picture,
    )


def _calibration(found: _Run) -> Card | None:
    sets = {
        name: found.last[name]["calibration"]
        for name in ("student", "ensemble")
        if (found.last.get(name) or {}).get("calibration")
    }
    if not sets:
        return None
    return Card(
        "Calibration",
        "On the dashed line a prediction of 80 % is right four times in five; points below it "
        "are over-confident. The small bars show where the samples lie. ECE is the mean distance "
        "from the line: 0 % is best.",
        found.draw(plots.calibration_picture, sets),
    )


def _partition(found: _Run) -> Card | None:
    title, counts = "Private images per client and class", found.class_counts
    if found.run.experiment.promises:
        return None
    if counts is None:
        return Card(title, f"Not shown: {found.data_problem}")
    caption = (
        "Each column is a client, the area of a dot (or the shade of a cell) its images of a "
        "class. Gaps are classes that its teacher has never seen; the bars on top are the sizes "
        "of the shards."
    )
    picture = found.draw(partition_picture, counts, found.classes)
    return Card(title, caption, picture, wide=counts.shape[0] > 16 or counts.shape[1] > 20)


def _relations(found: _Run) -> list[Card]:
    title = "Agreement"
    if found.run.experiment.release is not None:
        return [Card(title, "Not shown: answers of single teachers are not released in this run.")]
    try:
        seen = relations(found.run, found.data, [r["round"] for r in found.rounds])
    except _TROUBLE as error:
        return [Card(title, f"Not shown: {error}")]
    if seen is None:
        return [Card(title, "Not shown: no finished round has knowledge on disk.")]
    of = f"{seen.samples:,}" + (f" of {seen.total:,}" if seen.samples < seen.total else "")
    where = f"{of} transfer images, round {seen.round}"
    inner = seen.agreement[: seen.teachers, : seen.teachers]
    caption = f"Share of samples ({where}) on which two of them name the same class. "
    if seen.teachers > 1:
        pairs = inner[np.triu_indices(seen.teachers, k=1)]
        caption += f"Two teachers agree on {percent(float(pairs.mean()))} on average. "
    if seen.teachers < seen.of:
        caption += f"{seen.teachers} of {seen.of} teachers are shown. "
    caption += "A dark row is a teacher who sees things differently from everybody."
    apart = len(seen.names) - seen.teachers
    picture = found.draw(plots.agreement_picture, seen.names, seen.agreement, apart)
    cards = [Card(title, caption, picture)]
    if seen.graphs is None:
        return [*cards, Card("Relation graphs", f"Not shown: {seen.problem}.")]
    return cards + _graphs(found, seen, where)


def _graphs(found: _Run, seen: Relations, where: str) -> list[Card]:
    graphs, classes = seen.graphs, found.classes
    assert graphs is not None
    cards = []
    if len(graphs.classes) > 2:
        alike, apart = likeness(graphs.class_student, graphs.class_teachers)
        some = (
            f"The {len(graphs.classes)} most frequent of {len(classes)} classes. "
            if len(graphs.classes) < len(classes)
            else ""
        )
        names = [classes[c] for c in graphs.classes]
        cards.append(
            Card(
                "Relations between classes",
                f"Correlation of two classes' z-scored logits over {where}: red classes rise "
                "together (they look alike), blue ones exclude each other. " + some + "The right "
                f"picture is what the student has not taken over: edges correlate with "
                f"{alike:.2f}, mean difference {apart:.2f}.",
                found.draw(
                    plots.graph_picture, graphs.class_student, graphs.class_teachers, names=names
                ),
                wide=True,
            )
        )
    shown = sum(count for _, count in graphs.blocks)
    if shown > 2:
        alike, apart = likeness(graphs.sample_student, graphs.sample_teachers)
        blocks = [(classes[label], count) for label, count in graphs.blocks]
        some = "the most frequent classes, " if len(classes) > 24 else ""
        cards.append(
            Card(
                "Relations between samples",
                f"Cosine of two samples' z-scored logits, {shown} transfer images sorted by "
                f"pseudo-label ({some}white lines between classes). Red squares along the "
                "diagonal are classes that hold together; red beside it, classes taken for each "
                f"other. Edges of both correlate with {alike:.2f}, mean difference {apart:.2f}.",
                found.draw(
                    plots.graph_picture,
                    graphs.sample_student,
                    graphs.sample_teachers,
                    blocks=blocks,
                ),
                wide=True,
            )
        )
    return cards


def _traffic(found: _Run) -> Card:
    title = "Bytes per round"
    if not found.ledger:
        return Card(title, "No message has been sent yet.")
    rounds = sorted({e["round"] for e in found.ledger})
    ways: dict[str, dict[str, list[float]]] = {"up": {}, "down": {}}
    for phase in dict.fromkeys(e["phase"] for e in found.ledger):
        for way, phases in ways.items():
            sums = dict.fromkeys(rounds, 0.0)
            for entry in found.ledger:
                if entry["phase"] == phase:
                    sums[entry["round"]] += entry[way]
            phases[phase] = list(sums.values())
    return Card(
        title,
        "All clients together, as Flower serialises the messages; above the line from clients, "
        "below it to them. The hatched phase 'evaluate' is measurement for this report (teachers' "
        "answers on test images, the student's trip to the clients), not part of the method.",
        found.draw(plots.traffic_picture, rounds, ways["up"], ways["down"]),
    )


def _cost(found: _Run) -> Card | None:
    per_round: dict[int, float] = {}
    for entry in found.ledger:
        if entry["phase"] == "knowledge":
            per_round[entry["round"]] = per_round.get(entry["round"], 0.0) + entry["up"]
    if not found.rounds or not per_round:
        return None
    numbers = [r["round"] for r in found.rounds]
    sent = np.cumsum([per_round.get(number, 0.0) for number in numbers]).tolist()
    size = found.transfer["bytes"]
    scores = [_score(r, "student") for r in found.rounds]
    everyone = size * found.run.experiment.clients if size else None
    return Card(
        "Accuracy for bytes",
        "What the knowledge sent so far has bought; the numbers are rounds. A flat end means that "
        "further rounds cost bytes and bring nothing."
        + (" The dashed line is the cost of the common images themselves." if everyone else ""),
        found.draw(
            plots.cost_picture,
            sent,
            scores,
            numbers,
            everyone,
        ),
    )


def _time(found: _Run) -> Card | None:
    timed = [r for r in found.rounds if r.get("seconds")]
    if not timed:
        return None
    sums: dict[str, float] = {}
    for record in timed:
        for phase, spent in record["seconds"].items():
            sums[phase] = sums.get(phase, 0.0) + spent
    bars: dict[str, Mapping[str, float]] = {}
    if len(timed) <= 8:
        bars |= {f"round {r['round']}": r["seconds"] for r in timed}
    whole = found.summary.get("seconds", {}).get("total", 0.0)
    rest = whole - sum(sums.values())
    if rest > 0.05:
        sums["start-up"] = rest
    if len(timed) > 1:
        bars["whole run"] = sums
    caption = "'train' and 'knowledge' are the clients' work as the server waits for it."
    if rest > 0.05:
        caption += " The baselines are not counted."
    return Card("Time per phase", caption, found.draw(plots.time_picture, bars))


# -- tables --------------------------------------------------------------------------------------


def _privacy(found: _Run) -> Record | None:
    """The statement, with clients of the same fate in one row."""
    facts = statement(found.run)
    if facts is None:
        return None
    fates: dict[tuple[float, tuple[int, ...]], list[str]] = {}
    for client, mine in facts["clients"].items():
        fates.setdefault((mine["epsilon"], tuple(mine["frozen_in"])), []).append(client)
    rows = [
        {
            "clients": ", ".join(who) if len(who) < len(facts["clients"]) else f"all {len(who)}",
            "epsilon": f"{epsilon:.4g}",
            "share": epsilon / facts["budget"],
            "frozen": ", ".join(map(str, frozen)),
        }
        for (epsilon, frozen), who in fates.items()
    ]
    return {**facts, "rows": rows}


def _traffic_tables(found: _Run) -> Record:
    """Totals per phase and per client, and for scale what other ways would cost."""
    phases: dict[str, dict[str, int]] = {}
    clients: dict[int, dict[str, int]] = {}
    for entry in found.ledger:
        total = phases.setdefault(entry["phase"], {"down": 0, "up": 0})
        for way in ("down", "up"):
            total[way] += entry[way]
        # When nodes describe themselves the ledger holds node ids: their clients are not known.
        if entry["phase"] != "describe":
            row = clients.setdefault(entry["client"], {})
            for way in ("down", "up"):
                key = f"{entry['phase']} {way}"
                row[key] = row.get(key, 0) + entry[way]
                row[way] = row.get(way, 0) + entry[way]
    parameters = found.summary.get("student", {}).get("parameters")
    return {
        "phases": phases,
        "total": {way: sum(p[way] for p in phases.values()) for way in ("down", "up")},
        "columns": [p for p in ("train", "knowledge", "evaluate") if p in phases],
        "clients": dict(sorted(clients.items())),
        "transfer": found.transfer["bytes"],
        "images": found.transfer["size"],
        "weights": None if parameters is None else 4 * parameters,
    }


# -- words ---------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """`87.1 %`, or a dash for what is not known."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _or_dash(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def human_bytes(size: float) -> str:
    """`1.2 MB` (powers of 1,000, as network traffic is counted)."""
    unit, scale = plots.byte_unit(size)
    return f"{size:.0f} B" if unit == "B" else f"{size / scale:.{2 if unit == 'GB' else 1}f} {unit}"


def _bar(value: float | None) -> str:
    """A share as a CSS width."""
    return "0" if value is None or not math.isfinite(value) else f"{100 * value:.2f}%"


def _points(gap: float) -> str:
    if not math.isfinite(gap):
        return DASH
    sign = "±" if abs(gap) < 5e-4 else "+" if gap > 0 else MINUS
    return f"{sign}{abs(100 * gap):.1f} points"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _date(run: RunDirectory) -> str:
    """When the run was created: its name says so, else its config's age."""
    match = re.search(r"-(\d{8}-\d{6})-[0-9a-f]{4}$", run.identity)
    if match:
        moment = time.strptime(match[1], "%Y%m%d-%H%M%S")
    else:
        moment = time.localtime((run.path / "config.yaml").stat().st_mtime)
    return time.strftime("%Y-%m-%d %H:%M", moment)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _score(record: Record, who: str) -> float:
    return _number((record.get(who) or {}).get("accuracy"))


def _known(values: Any) -> list[float]:
    return [float(v) for v in values if v is not None and math.isfinite(v)]
