"""The figures of a run, each with what to see in it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from fedkd.build import build_domains
from fedkd.io.text import from_ranges, ranges
from fedkd.reporting import run_figures as draw
from fedkd.reporting.domain_table import CAPTION, Judged, Spread, alone, domain_table
from fedkd.reporting.format import as_float, count, finite, percent, points, short
from fedkd.reporting.page import Card, half
from fedkd.reporting.relation_report import Relations, likeness, relations
from fedkd.reporting.run_record import TROUBLE, Found
from fedkd.reporting.run_tables import time_table
from fedkd.runs.events import ClientsAsked


def accuracy_card(found: Found) -> Card:
    """The student, the ensemble and the teachers over the rounds."""
    title = "Test accuracy per round"
    if not found.rounds:
        return half(title, "No round has finished, so there is nothing to draw yet.")
    numbers = [r.round for r in found.rounds]
    lines = {
        "student": [r.student.accuracy for r in found.rounds],
        "ensemble": [as_float(r.ensemble and r.ensemble.accuracy) for r in found.rounds],
        "pseudo-labels": [as_float(r.pseudo_labels) for r in found.rounds],
    }
    clients = sorted({c for r in found.rounds for c in r.teachers})
    teachers = {c: [as_float(r.teachers.get(c)) for r in found.rounds] for c in clients}
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
    figure = draw.accuracy_figure(numbers, lines, teachers, levels)
    return half(title, caption.strip(), figure)


def classes_card(found: Found) -> Card | None:
    """Accuracy within each class; None before the first evaluation."""
    scores = {who: s.per_class for who, s in found.scores.items() if s.per_class}
    if not scores:
        return None
    classes, counts = found.classes, found.class_counts
    held = [] if counts is None else [int(n) for n in (counts > 0).sum(axis=0)]
    caption = (
        "Accuracy within each class after the last round, in percent. Pale is good; a class dark "
        "in both rows is one the teachers do not know. "
    )
    if np.isnan(np.asarray([*scores.values()], dtype=float)).any():
        caption += "Grey classes are without test images. "
    if held and len(classes) <= 25:
        caption += "Below a class: how many clients hold it. "
    caption += _losers(classes, scores)
    return Card("Accuracy per class", caption, [draw.class_figure(classes, scores, held)])


def _losers(classes: Sequence[str], scores: Mapping[str, Sequence[float]]) -> str:
    if len(scores) < 2:
        return ""
    gaps = np.asarray(scores["student"], dtype=float) - np.asarray(scores["ensemble"], dtype=float)
    worst = [int(c) for c in np.argsort(gaps, kind="stable")[:3] if gaps[c] < -0.005]
    if not worst:
        return "The student loses nothing to the ensemble in any class."
    listed = ", ".join(f"'{short(classes[c], 24)}' ({points(gaps[c])})" for c in worst)
    return f"It loses most to the ensemble in {listed}."


def training_cards(found: Found) -> list[Card]:
    """Every term of the objective over the epochs, and how hard each pulls on the student."""
    title, epochs = "Loss terms per epoch", found.epochs
    if not epochs:
        return [half(title, "The student has not trained for an epoch yet.")]
    drawn = draw.training_figures(
        [epoch.loss for epoch in epochs],
        [epoch.terms for epoch in epochs],
        [epoch.gradients for epoch in epochs],
        [epoch.round for epoch in epochs],
        found.run.experiment.distillation.losses,
    )
    texts = {
        title: "Each term before its weight; a step up at a dotted line is a new round with new "
        "teachers and a fresh learning-rate schedule. The terms count different things: compare "
        "shapes, not heights.",
        "Who pulls how hard": "Length of each weighted term's gradient on the student, in the "
        "first batch of every epoch, as a share of all. A term with a sliver here does not steer "
        "the student, whatever its loss shows.",
    }
    return [half(*text, figure) for text, figure in zip(texts.items(), drawn)]


def calibration_card(found: Found) -> Card | None:
    """Confidence against accuracy; None before the first evaluation."""
    sets = {who: asdict(s.calibration) for who, s in found.scores.items() if s.calibration}
    if not sets:
        return None
    scaled = found.summary.get("temperature")
    note = ""
    if scaled is not None:
        last = [(name, sets.pop(name)) for name in list(sets) if name != "student"]
        sets = {**sets, "student, scaled": scaled["calibration"], **dict(last)}
        images = count(scaled["images"], f"{scaled['source']} image")
        by = "" if scaled["source"] == "validation" else ", against the targets it learnt from"
        note = (
            f" Scaled: logits divided by {scaled['value']:.3g}, which was found on {images}{by}; "
            "predictions and exports use it."
        )
    return half(
        "Calibration",
        "On the dashed line a prediction of 80 % is right four times in five; points below it "
        "are over-confident, points above it under-confident. The small bars show where the "
        f"samples lie. ECE is the mean distance from the line: 0 % is best.{note}",
        draw.calibration_figure(sets),
    )


_PAIRS = 10  # as many fit side by side


def pairs_card(found: Found) -> Card | None:
    """Some pairs of the transfer set; None where clients and student see the same."""
    if not found.run.experiment.data.transfer.pairs:
        return None
    title, data = "Pairs", found.data
    if data is None:
        return half(title, f"Not shown: {found.data_problem}")
    rows = np.linspace(0, len(data.transfer) - 1, min(_PAIRS, len(data.transfer))).astype(int)
    sides = {name: side.transfer.images.images[rows].numpy() for name, side in data.sides.items()}
    student, hidden = found.run.experiment.student.modality, data.transfer.true_labels
    sides = {name: sides[name] for name in sorted(sides, key=lambda name: name in student)}
    true = [None if hidden is None else found.classes[int(hidden[row])] for row in rows]
    try:
        fused = np.asarray(found.run.knowledge(found.rounds[-1].round).fused("probabilities"))
        said = [found.classes[int(np.argmax(fused[row]))] for row in rows]
    except (*TROUBLE, IndexError):  # no round yet, or its knowledge is gone
        said = [name or "?" for name in true]
    caption = (
        f"Each column is one sample of the transfer set as clients and student see it; the student "
        f"sees the side '{' and '.join(student)}'. Below, what the teachers together call it in "
        "the last round" + ("; where they are wrong, what it is." if hidden is not None else ".")
    )
    return Card(title, caption, [draw.pairs_figure(sides, said, true)])


def partition_card(found: Found) -> Card | None:
    """Who holds how many images of which class."""
    title, counts = "Private images per client and class", found.class_counts
    if found.run.experiment.promises:
        return None
    if counts is None:
        return half(title, f"Not shown: {found.data_problem}")
    caption = (
        "Each column is a client, the shade of a cell its images of a class. Gaps are classes that "
        "its teacher has never seen."
    )
    clients = [client for client in found.listed if client < len(counts)]
    if len(clients) < len(counts):
        caption += f" {len(clients):,} of {len(counts):,} clients: those that were asked last."
        if not clients:
            return half(title, "No client has been asked yet.")
    figure = draw.partition_figure(counts[clients], found.classes, clients=clients)
    return Card(title, caption, [figure], wide=len(clients) > 16 or counts.shape[1] > 20)


def domains_card(found: Found) -> Card | None:
    """How good teachers and student are in which domain; None where all are of one."""
    last, given = found.last, found.run.experiment.data.domains
    if last is None or given is None or not last.sources:
        return None
    names = [scores.name for scores in last.sources]
    shifts = build_domains(given, "data.domains")

    def mean(values: Iterable[float | None]) -> Spread | None:
        known = finite(values)
        return alone(statistics.fmean(known)) if known else None

    rows = []
    for number, home in enumerate(names):
        clients = [c for c in last.teachers if shifts.number_of(c) == number]
        sources = {
            scores.name: mean(scores.teachers.get(client) for client in clients)
            for scores in last.sources
        }
        target = mean(last.teachers[client] for client in clients)
        note = count(len(clients), "client")
        rows.append(Judged(f"teachers of {home}", target, sources, home, note))
    if last.ensemble is not None:
        rows.append(Judged("ensemble", alone(last.ensemble.accuracy), home="", key="ensemble"))
    student = {scores.name: alone(scores.student) for scores in last.sources}
    rows.append(Judged("student", alone(last.student.accuracy), student, key="student"))
    return Card("Domains", CAPTION, table=domain_table(str(shifts.target), names, rows))


def presence_card(found: Found) -> Card | None:
    """Who was there, was asked and answered, and who counted by an old answer.

    None where every round asks all clients and learns from their answers alone.
    """
    if not (found.asked or found.old):
        return None
    answered = {event.round: event.answered for event in found.rounds}
    everybody = range(found.run.experiment.clients)
    known = {event.round: event for event in found.asked}
    asked = [
        known.get(number)
        or ClientsAsked(
            round=number, asked=[*everybody], wanted=len(everybody), there=ranges(everybody)
        )
        for number in answered
    ]
    rounds = list(answered)
    ever = sorted({client for event in asked for client in from_ranges(event.there)})
    places = {client: row for row, client in enumerate(ever)}
    table = np.zeros((len(ever), len(rounds)), dtype=np.int8)
    ages = np.zeros_like(table, dtype=int)
    for column, event in enumerate(asked):
        for state, clients in enumerate(
            (from_ranges(event.there), event.asked, answered[event.round]), start=1
        ):
            table[[places[client] for client in clients if client in places], column] = state
        for client, earlier in found.old.get(event.round, {}).items():
            if client in places:
                ages[places[client], column] = event.round - earlier
    silent = int((table == 2).sum())
    old = ages[ages > 0]
    buffered = found.run.experiment.federation.mode == "buffered"
    return Card(
        "Who was there",
        f"Of {count(len(ever), 'client')} that {'was' if len(ever) == 1 else 'were'} there at some "
        f"time, a round asked {np.mean([len(event.asked) for event in asked]):.3g} on "
        "average. Where a row is white, the client was away"
        + (" or still busy with an earlier round. " if buffered else ". ")
        + (
            f"{count(silent, 'time')} a client was asked and gave nothing "
            + ("in that round. " if buffered else "that was used. ")
            if silent
            else ""
        )
        + (
            f"{count(len(old), 'time')} a client counted by an earlier answer, "
            f"{old.mean():.2g} rounds old on average (in the cell: how old)."
            if len(old)
            else ""
        ),
        [draw.presence_figure(ever, rounds, table, ages)],
        wide=len(rounds) > 30,
    )


def relation_cards(found: Found) -> list[Card]:
    """How teachers and student agree, and what relations the student has taken over."""
    title = "Agreement"
    if found.run.experiment.release is not None:
        return [half(title, "Not shown: answers of single teachers are not released in this run.")]
    try:
        seen = relations(found.run, found.data, [r.round for r in found.rounds])
    except TROUBLE as error:
        return [half(title, f"Not shown: {error}")]
    if seen is None:
        return [half(title, "Not shown: no finished round has knowledge on disk.")]
    of = f"{seen.samples:,}" + (f" of {seen.total:,}" if seen.samples < seen.total else "")
    where = f"{of} transfer images, round {seen.round}"
    inner = seen.agreement[: seen.teachers, : seen.teachers]
    caption = f"Share of samples ({where}) on which two of them name the same class. "
    if seen.teachers > 1:
        pairs = inner[np.triu_indices(seen.teachers, k=1)]
        caption += f"Two teachers agree on {percent(float(pairs.mean()))} on average. "
    if seen.teachers < seen.of:
        caption += f"{seen.teachers} of {seen.of} teachers are shown. "
    caption += "A dark row is a teacher who answers differently from everybody."
    apart = len(seen.names) - seen.teachers
    figure = draw.agreement_figure(seen.names, seen.agreement, apart)
    cards = [half(title, caption, figure)]
    if seen.graphs is None:
        return [*cards, half("Relation graphs", f"Not shown: {seen.problem}.")]
    return cards + _graphs(found, seen, where)


def _graphs(found: Found, seen: Relations, where: str) -> list[Card]:
    graphs, classes = seen.graphs, found.classes
    assert graphs is not None
    cards = []
    if len(graphs.classes) > 2:
        edges = graphs.class_student, graphs.class_teachers
        alike, apart = likeness(*edges)
        some = ""
        if len(graphs.classes) < len(classes):
            some = f"The {len(graphs.classes)} most frequent of {len(classes)} classes. "
        caption = (
            f"Correlation of two classes' z-scored logits over {where}: red classes rise together "
            f"(they look alike), blue ones exclude each other. {some}The figure at the right is "
            "what the student has not taken over: edges correlate with "
            f"{alike:.2f}, mean difference {apart:.2f}."
        )
        figure = draw.graph_figure(*edges, names=[classes[c] for c in graphs.classes])
        cards.append(Card("Relations between classes", caption, [figure]))
    shown = sum(count for _, count in graphs.blocks)
    if shown > 2:
        edges = graphs.sample_student, graphs.sample_teachers
        alike, apart = likeness(*edges)
        some = "the most frequent classes, " if len(classes) > 24 else ""
        caption = (
            f"Cosine of two samples' z-scored logits, {shown} transfer images sorted by "
            f"pseudo-label ({some}white lines between classes). Red squares along the diagonal are "
            "classes that hold together; red beside it, classes taken for each other. Edges of "
            f"both correlate with {alike:.2f}, mean difference {apart:.2f}."
        )
        blocks = [(classes[label], count) for label, count in graphs.blocks]
        figure = draw.graph_figure(*edges, blocks=blocks)
        cards.append(Card("Relations between samples", caption, [figure]))
    return cards


def traffic_card(found: Found) -> Card:
    """Bytes up and down, per round."""
    title = "Bytes per round"
    if not found.messages:
        return half(title, "No message has been sent yet.")
    rounds = sorted({message.round for message in found.messages})
    groups: dict[str, dict[str, list[list[float]]]] = {"the method": {}, "measurement": {}}
    for message in found.messages:
        group = groups["measurement" if message.phase == "evaluate" else "the method"]
        ways = group.setdefault(message.phase, [[0.0] * len(rounds), [0.0] * len(rounds)])
        for way, size in zip(ways, (message.up, message.down), strict=True):
            way[rounds.index(message.round)] += size
    return half(
        title,
        "All clients together, as Flower serialises the messages; above the line from clients, "
        "below it to them. 'evaluate' is measurement for this report (teachers' answers on test "
        "images, the student's trip to the clients), not part of the method.",
        draw.stacked_figure(rounds, groups),
    )


def cost_card(found: Found) -> Card | None:
    """Accuracy against bytes; None without either."""
    per_round: dict[int, float] = {}
    for message in found.messages:
        if message.phase in ("knowledge", "masked"):
            per_round[message.round] = per_round.get(message.round, 0.0) + message.up
    if not found.rounds or not per_round:
        return None
    numbers = [r.round for r in found.rounds]
    sent = np.cumsum([per_round.get(number, 0.0) for number in numbers]).tolist()
    size = found.transfer["bytes"]
    scores = [r.student.accuracy for r in found.rounds]
    everyone = size * found.run.experiment.clients if size else None
    return half(
        "Accuracy for bytes",
        "What the knowledge sent so far has bought; the numbers are rounds. A flat end means that "
        "further rounds cost bytes and bring nothing."
        + (" The dashed line is the cost of the common images themselves." if everyone else ""),
        draw.cost_figure(sent, scores, numbers, everyone),
    )


def time_card(found: Found) -> Card | None:
    """Seconds per phase and round; None if they were not measured."""
    timed = [event for event in found.rounds if event.seconds]
    if not timed:
        return None
    phases = dict.fromkeys(phase for event in timed for phase in event.seconds)
    spent = {phase: [[event.seconds.get(phase, 0.0) for event in timed]] for phase in phases}
    figure = draw.stacked_figure([event.round for event in timed], {"seconds": spent}, bytes=False)
    caption = "'train' and 'knowledge' are the clients' work as the server waits for it."
    if "start-up" in found.seconds:
        caption += " The baselines are not counted."
    return Card("Time per phase", caption, [figure], time_table(found), wide=False)
