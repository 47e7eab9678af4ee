"""The pictures of a comparison: plain numbers in, a matplotlib `Figure` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from fedkd.reporting.drawing import GREY, INK, canvas, short

# Okabe and Ito's, for fedkd first; baselines repeat them with other dashes and markers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#24292f")
_DASHES = ("--", ":", "-.")
_MARKERS = "osD^vP*X<>hd"


@dataclass(frozen=True)
class Look:
    """How a row is drawn in every picture."""

    color: str
    dashes: str
    marker: str
    width: float


def looks(kinds: Mapping[str, str]) -> dict[str, Look]:
    """Name -> look, from name -> kind: fedkd's rows solid and wide, baselines broken and thin."""
    counts = {True: 0, False: 0}
    found = {}
    for name, kind in kinds.items():
        ours = kind == "fedkd"
        number = counts[ours]
        counts[ours] += 1
        # Baselines start elsewhere in colours and markers: the first ones differ from fedkd's.
        place = number if ours else number + 2
        color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
        dashes = "-" if ours else _DASHES[number // len(_COLORS) % len(_DASHES)]
        found[name] = Look(color, dashes, marker, 2.4 if ours else 1.2)
    return found


def curves_picture(
    curves: Mapping[str, Sequence[Sequence[float]]], shown: Mapping[str, Look]
) -> Figure:
    """Test accuracy per round: mean over seeds, and from lowest to highest.

    Args:
        curves: Name -> seed -> accuracy of each round.
        shown: Name -> look.
    """
    figure, axes = canvas(11.0, 4.6)
    for name, seeds in curves.items():
        length = min(map(len, seeds))
        table = np.asarray([seed[:length] for seed in seeds], dtype=float)
        rounds = np.arange(1, length + 1)
        look = shown[name]
        if len(table) > 1:
            axes.fill_between(
                rounds, table.min(axis=0), table.max(axis=0), color=look.color, alpha=0.1, lw=0
            )
        axes.plot(
            rounds, table.mean(axis=0), color=look.color, ls=look.dashes, lw=look.width,
            marker=look.marker, ms=4.5, label=short(name, 26),
        )  # fmt: skip
    _finish(figure, axes, "round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def traffic_picture(
    traffic: Mapping[str, tuple[Sequence[float], Sequence[float], float]],
    shown: Mapping[str, Look],
) -> Figure:
    """Test accuracy over megabytes sent so far; what sends nothing is a level.

    Args:
        traffic: Name -> bytes after each round, accuracy after each round, bytes of shipping the
            transfer set.
        shown: Name -> look.
    """
    figure, axes = canvas(11.0, 4.6)
    for name, (size, accuracy, transfer) in traffic.items():
        look = shown[name]
        drawn = {"color": look.color, "ls": look.dashes, "label": short(name, 26)}
        if size[-1] <= 0:
            axes.axhline(accuracy[-1], lw=1.2, alpha=0.7, **drawn)
            continue
        megabytes = np.asarray(size) / 1e6
        axes.plot(megabytes, accuracy, lw=look.width, marker=look.marker, ms=4.5, **drawn)
        if transfer > 0:
            paid = megabytes[-1] + transfer / 1e6
            axes.plot([megabytes[-1], paid], [accuracy[-1]] * 2, color=look.color, lw=0.7, ls=":")
            axes.plot([paid], [accuracy[-1]], marker=look.marker, ms=7, mfc="none",
                      color=look.color)  # fmt: skip
    if any(size[-1] > 0 for size, _, _ in traffic.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    _finish(figure, axes, "megabytes, all clients, both ways")
    return figure


def budget_picture(
    order: Sequence[str],
    students: Mapping[str, Mapping[str, Sequence[float]]],
    teachers: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
    """Accuracy for epsilon: a line per mechanism, students solid, teachers dashed.

    Args:
        order: Budgets as the axis shows them, smallest first.
        students: Mechanism -> budget -> final accuracy of each seed.
        teachers: Likewise, of the mean teacher, for mechanisms that tell.
    """
    figure, axes = canvas(9.0, 4.6)
    for number, (name, line) in enumerate(students.items()):
        color = _COLORS[number % len(_COLORS)]
        for values, dashes, what in ((line, "-", ""), (teachers.get(name, {}), "--", ", teachers")):
            places = [place for place, budget in enumerate(order) if budget in values]
            if not places:
                continue
            cells = [np.asarray(values[order[place]]) for place in places]
            means = [float(cell.mean()) for cell in cells]
            if not what:
                lows, highs = [c.min() for c in cells], [c.max() for c in cells]
                axes.fill_between(places, lows, highs, color=color, alpha=0.12, lw=0)
            axes.plot(
                places, means, color=color, ls=dashes, marker=_MARKERS[number % len(_MARKERS)],
                ms=5 if not what else 3, lw=2.0 if not what else 1.1, label=name + what,
            )  # fmt: skip
    axes.set_xticks(range(len(order)), order)
    _finish(figure, axes, "epsilon")
    return figure


def _finish(figure: Figure, axes: Any, xlabel: str) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(xlabel)
    axes.set_ylabel("test accuracy")
    figure.legend(loc="outside right upper")


def heat_picture(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    labels: tuple[str, str] = ("", ""),
    full: bool = False,
) -> Figure:
    """Accuracies as a table of colours with the numbers in it; what is not known stays grey.

    Args:
        rows: Names from the top.
        columns: Names from the left.
        values: (rows, columns).
        labels: What columns and rows are.
        full: Colours span 0 to 100 %, not the smallest to the largest.
    """
    table = np.asarray(
        [[np.nan if value is None else value for value in line] for line in values], dtype=float
    )
    figure, axes = canvas(11.0, 1.0 + 0.32 * len(rows))
    low, high = (0.0, 1.0) if full else (float(np.nanmin(table)), float(np.nanmax(table)))
    axes.imshow(table, aspect="auto", cmap="YlGnBu", vmin=low, vmax=max(high, low + 1e-6))
    axes.set_facecolor("#e9ebee")
    axes.set_xticks(range(len(columns)), [short(name, 18) for name in columns], rotation=30,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(name, 30) for name in rows])
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(table):
        if len(columns) <= 20 and np.isfinite(value):
            dark = (value - low) / max(high - low, 1e-6) > 0.55
            axes.text(column, row, f"{100 * value:.0f}" if full else f"{100 * value:.1f}",
                      ha="center", va="center", fontsize=8,
                      color="white" if dark else INK)  # fmt: skip
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return figure


def effects_picture(effects: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Main effects: one panel per factor, a dot per cell, a bar at each choice's mean.

    Args:
        effects: Factor -> choice -> final accuracy of each cell that has it.
    """
    widths = [1 + len(choices) for choices in effects.values()]
    figure, grid = canvas(11.0, 3.6, grid=(1, len(effects)), width_ratios=widths)
    panels = np.atleast_1d(np.asarray(grid, dtype=object)).ravel()
    everything = [v for choices in effects.values() for cells in choices.values() for v in cells]
    low, high = min(everything), max(everything)
    room = 0.1 * max(high - low, 0.01)
    for number, (axes, (factor, choices)) in enumerate(zip(panels, effects.items())):
        means = [float(np.mean(cells)) if cells else np.nan for cells in choices.values()]
        for place, cells in enumerate(choices.values()):
            axes.plot([place] * len(cells), cells, ".", color=GREY, ms=5, alpha=0.7)
        axes.plot(range(len(means)), means, color=_COLORS[0], lw=1.2, alpha=0.5)
        axes.plot(range(len(means)), means, color=_COLORS[0], ls="", marker="_", ms=22, mew=2.6)
        axes.set_xlim(-0.6, len(means) - 0.4)
        axes.set_ylim(low - room, high + room)
        axes.set_xticks(range(len(means)), [short(name, 24) for name in choices], rotation=25,
                        ha="right", rotation_mode="anchor")  # fmt: skip
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        if number:
            axes.tick_params(labelleft=False)
        axes.set_title(short(factor, 12 * widths[number]))
    panels[0].set_ylabel("final test accuracy")
    return figure
