"""The first things that a page says: state, one sentence, numbers, the table of teachers."""

from __future__ import annotations

import math
import statistics

from fedkd.reporting.format import TIMES, count, duration, finite, human_bytes, percent, points
from fedkd.reporting.run_record import Found, Record


def state(found: Found) -> Record:
    """Whether the run is finished, under way or went badly, for the badge."""
    done, wanted = len(found.rounds), found.run.experiment.rounds
    degraded = [r.round for r in found.rounds if r.status != "ok"]
    if found.summary and done >= wanted:
        kind, text = "complete", f"complete · {count(done, 'round')}"
    elif done:
        kind, text = "partial", f"not complete · {done} of {count(wanted, 'round')} so far"
    else:
        kind, text = "partial", f"no round of {wanted} has finished yet"
    return {"kind": kind, "text": text, "degraded": degraded}


def sentence(found: Found) -> str:
    """What was done, in one sentence."""
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


def tiles(found: Found) -> list[tuple[str, str, str]]:
    """(label, value, remark) of a few numbers worth a glance, after the student's accuracy."""
    tiles = []
    student, ensemble = found.accuracy("student"), found.accuracy("ensemble")
    if ensemble is not None:
        gap = f"student {points(student - ensemble)}" if student is not None else ""
        tiles.append(("teacher ensemble", percent(ensemble), gap))
    known = finite(found.last.teachers.values() if found.last else ())
    if known:
        middle = statistics.median(known)
        gap = f"student {points(student - middle)}" if student is not None else ""
        tiles.append(("median teacher", percent(middle), gap))
    size = found.summary.get("test", {}).get("size")
    if size and student is not None:
        half = 1.96 * math.sqrt(student * (1 - student) / size)
        tiles.append(("test images", f"{size:,}", f"student ± {100 * half:.1f} points (95 %)"))
    sent = sum(m.up for m in found.messages if m.phase == "knowledge")
    if sent:
        rounds = len({m.round for m in found.messages if m.phase == "knowledge"})
        per = sent / max(1, rounds * found.run.experiment.clients)
        tiles.append(("knowledge sent", human_bytes(sent), f"{human_bytes(per)} per client, round"))
    seconds = found.summary.get("seconds", {}).get("total")
    if seconds is None and found.rounds:
        seconds = sum(sum(r.seconds.values()) for r in found.rounds)
    if seconds:
        tiles.append(("time", duration(seconds), f"{count(len(found.rounds), 'round')}"))
    return tiles


def headline(found: Found) -> list[Record]:
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
    row("student", "student", shown, taught, found.accuracy("student"))
    best = summary.get("student", {})
    if best.get("best_accuracy", 0) > best.get("accuracy", math.inf):
        source = f"the same, after round {best['best_round']}"
        row("minor", "student at its best", "", source, best["best_accuracy"])
    if "ensemble" in found.scores:
        row("ensemble", "ensemble", "all teachers, fused", "", found.accuracy("ensemble"))
    known = finite(found.last.teachers.values() if found.last else ())
    if known:
        row("teacher", "best teacher", "", "its own private images", max(known))
        row("teacher", "median teacher", "", "its own private images", statistics.median(known))
    if last and last.pseudo_labels is not None:
        source = "ensemble on the transfer set, against its hidden labels"
        row("pseudo", "pseudo-labels", "", source, last.pseudo_labels)
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


def teachers(found: Found) -> list[Record]:
    """One row for each teacher."""
    counts, rows = found.class_counts, []
    scores = found.last.teachers if found.last else {}
    weights = found.last.weights if found.last else {}
    for client in range(found.run.experiment.clients):
        held = None if counts is None or client >= len(counts) else counts[client]
        rows.append(
            {
                "client": client,
                "model": found.run.experiment.teachers.model_of(client).name,
                "images": None if held is None else int(held.sum()),
                "classes": None if held is None else int((held > 0).sum()),
                "accuracy": scores.get(client),
                "weight": weights.get(client),
                "holdout": found.verdicts.get(client),
            }
        )
    return rows
