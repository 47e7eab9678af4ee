"""What became of labels of which some are wrong: a card's figures and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkd.config import Noisy
from fedkd.reporting import drawing as draw
from fedkd.reporting import format as fmt
from fedkd.reporting.page import Card
from fedkd.reporting.table import Cell, Column, Row, Table, numbers

Record = Mapping[str, Any]
Curves = Mapping[str, Sequence[Record]]
"""Whose training -> what was measured of each of its epochs."""

FIRST: draw.Look = {"color": draw.STUDENT}
SECOND: draw.Look = {"color": draw.PSEUDO, "ls": "--"}
BOTH: draw.Look = {"color": draw.ORACLE, "ls": "-."}
_SHOWN = 4


def noisy_cards(noisy: Noisy, curves: Curves, whose: str) -> list[Card]:
    """Curves, histograms and a table; none before an epoch has ended.

    Args:
        noisy: How the networks were trained.
        curves: Of one or several trainings.
        whose: What each of them is of, for the captions ("client").
    """
    curves = {name: records for name, records in curves.items() if records}
    if not curves:
        return []
    # Of a shard that was learnt plainly no losses were followed.
    followed = [name for name in curves if any("histogram" in r for r in curves[name])]
    name = followed[0] if followed else next(iter(curves))
    records = curves[name]
    cards = [
        Card("What became of the labels", _told(noisy, len(curves), whose), [curves_figure(curves)])
    ]
    if (drawn := histogram_figure(records)) is not None:
        of = f" of {name}" if len(curves) > 1 else ""
        cards.append(
            Card(
                f"Losses on the given labels{of}",
                "Of the first network, scaled from 0 to 1, in four epochs since the warm-up, with "
                "the two Gaussians that tell clean labels (left) from wrong ones. Where wrong "
                "labels (orange) move to the left the network is learning them by heart.",
                [drawn],
            )
        )
    table = labels_table(curves, whose)
    cards.append(Card(table=table, fold=f"Labels of each {whose}", open=len(curves) <= 12))
    return cards


def origin(noisy: Noisy) -> str:
    """Where the partner comes from, in a sentence."""
    name = "" if noisy.partner.model is None else noisy.partner.model.name
    model = noisy.partner.model
    by = "features" if noisy.knows else "pixels"
    votes = (
        f"reference labels are the majority of up to {noisy.neighbours} neighbours by {by}"
        if noisy.neighbours
        else "there are no reference labels, by which the paper loses most"
    )
    if noisy.method == "gmm":
        return f"One network drops the labels that it calls wrong itself; {votes}."
    if noisy.method != "acdu":
        return f"Two networks from scratch filter labels for each other; {votes}."
    if model is not None and model.options.get("weights") is not None:
        known = f"The partner ({name}) begins from the weights of a file"
    elif noisy.partner.pretraining != "none":
        whose = "common" if noisy.partner.pretraining == "transfer" else "own"
        known = f"The partner ({name}) was pretrained by contrasts of the {whose} images"
    else:
        known = (
            f"The partner ({name}) is from scratch, which is nearer to co-teaching than to the "
            "published ACD-U, whose partner knows images"
        )
    return f"{known}; {votes}."


def _told(noisy: Noisy, many: int, whose: str) -> str:
    lines = "Means" if many == 1 else f"Means of {fmt.count(many, whose)}, lowest to highest"
    text = f"{origin(noisy)} {lines}: the first network in blue, its partner in orange"
    text += "." if noisy.method == "gmm" else ", both together in green."
    return text + (
        " The labelled set is what counts as clean; its purity, the area under the curve of the "
        "chance of being clean, and the share of wrong labels among those unlearnt need the true "
        "labels, which no training reads."
    )


@draw.style()
def curves_figure(curves: Curves) -> Figure:
    """Accuracy, labelled set, its purity, AUC, and what is unlearnt, per epoch."""
    panels = [
        ("test accuracy", ("accuracy_a", "accuracy_v", "accuracy_both"), True),
        ("labels called clean", ("labelled_a", "labelled_v"), False),
        ("of them right", ("purity_a", "purity_v"), True),
        ("AUC of the chance", ("auc_a", "auc_v"), True),
        ("labels unlearnt", ("unlearnt_a", "unlearnt_v"), False),
        ("of them wrong", ("wrong_a", "wrong_v"), True),
        ("forget loss", ("forget_a", "forget_v"), False),
    ]
    known = {key for records in curves.values() for record in records for key in record}
    shown = [panel for panel in panels if any(key in known for key in panel[1])]
    columns = min(4, max(len(shown), 1))
    rows = max(1, -(-len(shown) // columns))
    figure, grid = draw.panels(11.0, 0.4 + 1.9 * rows, rows, columns)
    for axes, (title, keys, share) in zip(grid, shown):
        axes.set_title(title, color=draw.INK)
        for key, look in zip(keys, (FIRST, SECOND, BOTH)):
            if key in known:
                _line(axes, curves, key, look)
        _phases(axes, next(iter(curves.values())))
        if share:
            draw.percents(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.margins(x=0.02)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch (grey: warm-up; pale orange: unlearning)", fontsize=8.5,
                     color=draw.GREY)  # fmt: skip
    return figure


def _line(axes: Axes, curves: Curves, key: str, look: draw.Look) -> None:
    epochs = sorted({r["epoch"] for records in curves.values() for r in records if key in r})
    runs = []
    for records in curves.values():
        values = {r["epoch"]: fmt.as_float(r.get(key)) for r in records}
        runs.append([values.get(epoch, float("nan")) for epoch in epochs])
    few = {"marker": "."} if len(epochs) < 8 else {}
    draw.Line("", epochs, runs, {**look, **few}).draw(axes)


def _phases(axes: Axes, records: Sequence[Record]) -> None:
    colors = {"warm-up": (draw.GREY, 0.12), "unlearning": (draw.ENSEMBLE, 0.2)}
    for record in records:
        if record["phase"] in colors:
            color, alpha = colors[record["phase"]]
            axes.axvspan(record["epoch"] - 0.5, record["epoch"] + 0.5, color=color, alpha=alpha,
                         lw=0)  # fmt: skip


@draw.style()
def histogram_figure(records: Sequence[Record]) -> Figure | None:
    """Losses in four epochs, of right and wrong labels if known, and the mixture."""
    known = [record for record in records if "histogram" in record]
    if not known:
        return None
    places = np.unique(np.linspace(0, len(known) - 1, _SHOWN).round().astype(int))
    figure, grid = draw.panels(11.0, 2.3, 1, len(places))
    for axes, place in zip(grid, places):
        record = known[place]
        counts = {name: np.asarray(bins) for name, bins in record["histogram"].items()}
        bins = len(next(iter(counts.values())))
        centres, below = (np.arange(bins) + 0.5) / bins, np.zeros(bins)
        colors = {"right": draw.STUDENT, "wrong": draw.PSEUDO, "all": draw.TEACHER}
        for name, each in counts.items():
            axes.bar(centres, each, 0.9 / bins, below, color=colors[name], alpha=0.55, label=name)
            below = below + each
        if "mixture" in record:
            x, total = np.linspace(0, 1, 200), below.sum()
            means, widths, shares = np.asarray(record["mixture"]).reshape(3, 2)
            for mean, width, share, dashes in zip(means, widths, shares, ("-", "--")):
                height = np.exp(-0.5 * ((x - mean) / width) ** 2) / (width * np.sqrt(2 * np.pi))
                axes.plot(x, share * height * total / bins, color=draw.INK, lw=1.1, ls=dashes)
        axes.set_ylim(0, 1.3 * float(below.max()))
        axes.set_title(f"epoch {record['epoch']}", color=draw.INK)
        axes.set_xlabel("loss")
    grid[0].legend(loc="upper right", ncols=2) if len(known[0]["histogram"]) > 1 else None
    return figure


def labels_table(curves: Curves, whose: str) -> Table:
    """A row for each training, of its last epoch; what is unlearnt over all selections."""
    columns = [
        Column(whose, look="first"),
        *numbers("called clean", "of them right", "AUC", "unlearnt", "of them wrong",
                 "first, %", "partner, %", "both, %"),
    ]  # fmt: skip
    rows = []
    for name, records in curves.items():
        last = records[-1]
        chosen = _selections(records)
        lost = last.get("lost_a", [])
        note = f"no label of {', '.join(map(fmt.short, lost))} looks clean" if lost else ""
        if last["phase"] == "plain":
            note = f"learnt plainly: neighbours confirm {fmt.percent(last['assent'])} of the labels"
        lowered = [record for record in records if "threshold_a" in record]
        if lowered:
            note += "; " * bool(note) + f"threshold lowered in {fmt.count(len(lowered), 'epoch')}"
        unlearnt = statistics.fmean(r["unlearnt_a"] for r in chosen) if chosen else None
        accuracies = [
            fmt.percent(_latest(records, key), unit="")
            for key in ("accuracy_a", "accuracy_v", "accuracy_both")
        ]
        rows.append(
            Row([
                Cell(name, note), fmt.number(last.get("labelled_a")),
                fmt.percent(last.get("purity_a")), fmt.number(last.get("auc_a"), ".3f"),
                fmt.number(unlearnt), fmt.percent(_mean(r.get("wrong_a") for r in chosen)),
                *accuracies,
            ])
        )  # fmt: skip
    return Table(columns, rows)


def _selections(records: Sequence[Record]) -> list[Record]:
    """The first epoch of each unlearning."""
    pairs = zip([None, *records[:-1]], records)
    return [
        record
        for before, record in pairs
        if record["phase"] == "unlearning" and (before is None or before["phase"] != "unlearning")
    ]


def _latest(records: Sequence[Record], key: str) -> float | None:
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
