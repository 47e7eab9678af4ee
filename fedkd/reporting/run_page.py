"""A run as a page: finished, under way or failed, and what is not there is named."""

from __future__ import annotations

import statistics
from pathlib import Path

from fedkd.data.splits import FederatedData
from fedkd.reporting import format as fmt
from fedkd.reporting import page
from fedkd.reporting import run_cards as cards
from fedkd.reporting import run_tables as tables
from fedkd.reporting.costs import caption, costs_table, run_lines
from fedkd.reporting.heads import CAPTION
from fedkd.reporting.noisy import noisy_cards
from fedkd.reporting.page import Card, Page, Section, Tile, size_tile
from fedkd.reporting.run_record import Found
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import Warned
from fedkd.runs.privacy_statement import statement

_MANY = 16  # longer tables are folded up
_REFUSED_SHOWN = 300
_MODALITIES = (
    "Teachers are judged on test samples as they see them; these are of the same classes as those "
    "that the student is judged on. Weight: their part in the fused labels of the last round."
)

_ANSWERS = ("knowledge", "masked")


def write_report(run: RunDirectory, data: FederatedData | None = None) -> Path:
    """Write `report.html` into the run's folder and return its path.

    The same run gives the same bytes. Parts that need the images are left out, and named, where
    the images cannot be loaded.

    Args:
        run: Finished or not.
        data: Its images; None: they are loaded.
    """
    return page.write(run.path / "report.html", make_page(Found(run, data)))


def make_page(found: Found) -> Page:
    """Everything on the page."""
    run, student = found.run, found.accuracy("student")
    done, wanted = len(found.rounds), run.experiment.rounds
    if found.summary and run.is_over:
        early = f", {wanted} at most" if done < wanted else ""
        state = f"complete · {fmt.count(done, 'round')}{early}"
    elif done:
        state = f"not complete · {done} of {fmt.count(wanted, 'round')} so far"
    else:
        state = f"no round of {wanted} has finished yet"
    degraded = [str(event.round) for event in found.rounds if event.status != "ok"]
    problem = found.data_problem
    digest = found.kept.hash if found.kept else None
    return Page(
        title=run.experiment.name,
        sentence=_sentence(found),
        sections=_sections(found),
        footer=run.identity + (f" · student {digest}" if digest else ""),
        state=state,
        partial=not state.startswith("complete"),
        warning=f"no quorum in round {', '.join(degraded)}" if degraded else "",
        remarks=[f"seed {run.experiment.seed}", fmt.date(run.path)],
        headline=None if student is None else (fmt.percent(student), _headline(found, student)),
        tiles=_tiles(found),
        notes=[f"The images could not be loaded, so figures that need them are missing: {problem}"]
        if problem
        else (),
    )


def _sections(found: Found) -> list[Section]:
    agree, *graphs = cards.relation_cards(found)
    learning = [*cards.training_cards(found), cards.calibration_card(found)]
    pairs = found.run.experiment.data.transfer.pairs
    clients = [
        Card("Accuracy per modality", _MODALITIES, table=tables.modalities_table(found))
        if pairs
        else None,
        cards.pairs_card(found),
        cards.presence_card(found),
        cards.partition_card(found),
        agree,
    ]
    costs = [
        cards.traffic_card(found),
        cards.cost_card(found),
        cards.time_card(found),
        *_costs(found),
        *_bytes(found),
    ]
    accuracy = [cards.accuracy_card(found), cards.classes_card(found)]
    promise = statement(found.run) is not None
    heads = tables.heads_of(found)
    versions = found.run.read_json("versions.json")
    return [
        Section("results", "Results", _results(found)),
        Section("heads", "Heads", [Card("", CAPTION, table=heads)] if heads else []),
        Section("accuracy", "Accuracy", [*accuracy, *_detection(found)]),
        Section("learning", "What the student learnt from", learning),
        Section("domains", "Domains", [cards.domains_card(found)]),
        Section("clients", "Clients and their teachers", clients),
        Section("labels", "Labels that may be wrong", _labels(found)),
        Section("relations", "What relations the student has taken over", graphs),
        Section("costs", "Bytes, time and energy", costs),
        Section("privacy", "Privacy", _privacy(found) if promise else []),
        Section("left-out", "Left out", [_left_out(found)]),
        page.config_section(found.run.path, versions, "run"),
    ]


def _labels(found: Found) -> list[Card]:
    noisy = found.run.experiment.teachers.noisy
    if noisy is None:
        return []
    if found.run.experiment.promises:
        return [Card("", "Not shown: what a promise of privacy is about stays with the client.")]
    title = "Not shown: no client has kept what it measured here."
    return noisy_cards(noisy, found.noisy, "client") or [Card("", title)]


def _sentence(found: Found) -> str:
    experiment, transfer = found.run.experiment, found.transfer
    losses = fmt.objective((term.name, term.weight) for term in experiment.distillation.losses)
    fusion = " → ".join(rule.name for rule in experiment.fusion)
    models = dict.fromkeys(model.name for model in experiment.teachers.models)
    kind = "labelled" if transfer["labelled"] else "unlabelled"
    common = f"{transfer['size']:,} common {kind} images"
    if pairs := experiment.data.transfer.pairs:
        sees = " and ".join(experiment.student.modality)
        common = f"{transfer['size']:,} common {kind} pairs of {' and '.join(pairs)}"
        common += f", of which the student sees {sees},"
    part = ""
    if found.asked:
        asked = statistics.mean(len(event.asked) for event in found.asked)
        part = f", {asked:.3g} of them in a round"
    end = " and never show their own."
    if server := experiment.teachers.server:
        names = ", ".join(dict.fromkeys(model.name for model in server))
        part += f" and {len(server)} of the server's own ({names})"
        end = ". Private images are never shown."
    return (
        f"One {experiment.student.model.name} student learns from {len(found.clients)} private "
        f"teachers ({', '.join(models)}){part}, who answer about {common}{end} "
        f"Fusion {fusion}; objective {losses}."
    )


def _headline(found: Found, student: float) -> str:
    between = fmt.counted(student, found.tested)
    return "student, test accuracy" + (f" · 95 %: {between}" if between else "")


def _tiles(found: Found) -> list[Tile]:
    tiles = []
    student, ensemble = found.accuracy("student"), found.accuracy("ensemble")
    known = fmt.finite(found.last.teachers.values() if found.last else ())
    median = statistics.median(known) if known else None
    for label, value in (("teacher ensemble", ensemble), ("median teacher", median)):
        if value is not None:
            gap = f"student {fmt.points(student - value)}" if student is not None else ""
            tiles.append(Tile(label, fmt.percent(value), gap))
    tiles += size_tile(found.summary.get("test", {}).get("size"), student, "student")
    if kept := found.summary.get("kept"):
        images = fmt.count(kept["images"], "validation image")
        remark = f"best on {images}: {fmt.percent(kept['validation'])}"
        tiles.append(Tile("round kept", f"{kept['round']} of {len(found.rounds)}", remark))
    answers = [message for message in found.messages if message.phase in _ANSWERS]
    if sent := sum(message.up for message in answers):
        per = sent / len({(message.round, message.client) for message in answers})
        remark = f"{fmt.human_bytes(per)} per client, round"
        tiles.append(Tile("knowledge sent", fmt.human_bytes(sent), remark))
    if found.seconds:
        total = sum(found.seconds.values())
        tiles.append(Tile("time", fmt.duration(total), fmt.count(len(found.rounds), "round")))
    return tiles


def _results(found: Found) -> list[Card]:
    clients, shown = found.run.experiment.clients, len(found.listed)
    server = len(found.run.experiment.teachers.server)
    who = f"The {fmt.count(clients + server, 'teacher')}"
    if shown < clients:
        who = f"{shown:,} of {fmt.count(clients, 'teacher')}: those that were asked last"
        who += ", and the server's" if server else ""
    when = "in the last round that asked it, " if found.asked else ""
    part = ""
    if found.run.experiment.teachers.classes is not None:
        part = " A teacher knows its own classes only, and is wrong about all other images."
    return [
        Card("", table=tables.results_table(found)),
        Card(
            "",
            f"A teacher is judged {when}on the public test images; the student also, by each "
            "client for itself, on private images that the client held out from training. Weight: "
            f"the teacher's part in the fused labels of the last round.{part}",
            table=tables.teachers_table(found),
            fold=who,
            open=clients <= _MANY,
        ),
    ]


def _bytes(found: Found) -> list[Card]:
    if not found.messages:
        return []
    experiment, scale = found.run.experiment, ""
    if found.transfer["bytes"]:
        scale += (
            f" the {found.transfer['size']:,} images of the transfer set are "
            f"{fmt.human_bytes(found.transfer['bytes'])} (uint8), sent to a client once if it does "
            "not have them."
        )
    if "parameters" in found.summary.get("student", {}):
        weights = fmt.human_bytes(4 * found.summary["student"]["parameters"])
        scale += (
            f" The student's weights are {weights}; averaging weights would move twice that per "
            "client and round."
        )
    clients = tables.clients_table(found)
    number = len(clients.rows)
    last = ", those that were asked last" if len(found.listed) < experiment.clients else ""
    title = f"Bytes per client ({fmt.count(number, 'client')}{last}; ↓ to it, ↑ from it)"
    scaled = scale and f"For scale:{scale}"
    return [
        Card("Bytes in total", scaled, table=tables.traffic_table(found), wide=False),
        Card(table=clients, fold=title, open=number <= _MANY),
    ]


def _detection(found: Found) -> list[Card]:
    table = tables.detection_table(found, clients=False)
    if table is None:
        return []
    few = "Of two classes the rarer one is to be found"
    many = "Each class is told from all others, and the numbers are means over the classes"
    caption = (
        "Accuracy praises who never names a rare class; these do not. Balanced accuracy: mean of "
        f"the accuracies within the classes. {few if len(found.classes) == 2 else many}. "
        "Sensitivity: share that is found where 95 % of the others are left alone. A client's own "
        "images may be few, and of few classes."
    )
    shown = [Card("Uneven classes", caption, table=table)]
    if (each := tables.detection_table(found, clients=True)) is not None:
        folded = "Uneven classes: each teacher, and the student at each client"
        shown.append(Card(table=each, fold=folded, open=len(each.rows) <= _MANY))
    return shown


def _costs(found: Found) -> list[Card]:
    record = found.summary.get("costs")
    if record is None:
        return []
    energy = record.get("energy")
    table = costs_table(run_lines(record), energy)
    title = f"Networks and work{f' · energy {energy}' if energy else ''}"
    return [Card(title, caption(energy), table=table)]


def _privacy(found: Found) -> list[Card]:
    return [
        Card(table=tables.promise_table(found)),
        Card(
            "",
            "How many images of which class a client has stays with the client, and out of this "
            "page. Not protected: that a client takes part, and what else it sends about itself. "
            "Accuracy on the public test set costs nothing.",
            table=tables.spent_table(found),
        ),
    ]


def _left_out(found: Found) -> Card:
    shown, more = found.refused[:_REFUSED_SHOWN], len(found.refused) - _REFUSED_SHOWN
    warnings = [*dict.fromkeys(event.text for event in found.run.events(Warned))]
    caption = f"… and {more} more in metrics.jsonl." if more > 0 else ""
    if not found.messages:
        caption = "Nothing: no client has been asked yet."
    elif not shown:
        caption = "Nothing: every reply that was asked for came and was accepted."
    return Card("", caption, table=tables.refused_table(shown) if shown else None, notes=warnings)
