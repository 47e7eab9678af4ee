"""The figures of comparisons, ablations and sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedkd.reporting import drawing as draw
from fedkd.reporting.format import number, short

_DASHES = ("--", ":", "-.")


def looks(kinds: Mapping[str, str]) -> dict[str, draw.Look]:
    """Name -> look, from name -> kind: fedkd's rows solid and wide, baselines broken and thin."""
    counts = {True: 0, False: 0}
    found = {}
    for name, kind in kinds.items():
        ours = kind == "fedkd"
        place = counts[ours]
        counts[ours] += 1
        dashes = "-" if ours else _DASHES[place // len(draw.COLORS) % len(_DASHES)]
        # Baselines start elsewhere in colours and markers: the first ones differ from fedkd's.
        place += 0 if ours else 2
        found[name] = {
            "color": draw.COLORS[place % len(draw.COLORS)],
            "marker": draw.MARKERS[place % len(draw.MARKERS)],
            "ls": dashes,
            "lw": 2.4 if ours else 1.2,
        }
    return found


def rounds_figure(
    rounds: Mapping[str, Sequence[Sequence[float]]], shown: Mapping[str, draw.Look]
) -> Figure:
    """Test accuracy per round: mean over seeds, and from lowest to highest.

    Args:
        rounds: Name -> seed -> accuracy of each round.
        shown: Name -> look.
    """
    longest = range(1, 1 + max(len(seed) for seeds in rounds.values() for seed in seeds))
    lines = [draw.Line(name, longest, seeds, shown[name], 0.1) for name, seeds in rounds.items()]
    figure = draw.curves(lines, "round")
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@draw.style()
def traffic_figure(
    traffic: Mapping[str, tuple[Sequence[float], Sequence[float], float]],
    shown: Mapping[str, draw.Look],
) -> Figure:
    """Test accuracy over megabytes sent so far; what sends nothing is a level.

    Args:
        traffic: Name -> bytes after each round, accuracy after each round, bytes of shipping the
            transfer set.
        shown: Name -> look.
    """
    lines, ends, levels = [], [], []
    for name, (size, accuracy, transfer) in traffic.items():
        look = shown[name]
        if size[-1] <= 0:
            levels.append((accuracy[-1], {**look, "label": short(name, 26), "marker": ""}))
            continue
        megabytes = [each / 1e6 for each in size]
        lines.append(draw.Line(name, megabytes, [accuracy], look))
        if transfer > 0:
            ends.append((megabytes[-1], megabytes[-1] + transfer / 1e6, accuracy[-1], look))
    figure = draw.curves(lines, "megabytes, all clients, both ways", levels=levels)
    (axes,) = figure.axes
    for start, paid, height, look in ends:
        color, marker = look["color"], look["marker"]
        axes.plot([start, paid], [height, height], color=color, lw=0.7, ls=":")
        axes.plot([paid], [height], marker=marker, ms=7, mfc="none", color=color)
    if lines:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    return figure


@draw.style()
def budget_figure(
    order: Sequence[str],
    students: Mapping[str, Mapping[str, Sequence[float]]],
    teachers: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
    """Accuracy for epsilon: a line per mechanism, students solid, teachers dashed.

    Args:
        order: Budgets as the axis shows them, smallest first.
        students: Mechanism -> budget -> final accuracy of each seed.
        teachers: Likewise, of the mean teacher, for mechanisms that disclose it.
    """
    lines = []
    for place, (name, student) in enumerate(students.items()):
        look: draw.Look = {
            "color": draw.COLORS[place % len(draw.COLORS)],
            "marker": draw.MARKERS[place % len(draw.MARKERS)],
        }
        thin = {**look, "ls": "--", "ms": 3, "lw": 1.1}
        lines.append(_over(order, name, student, {**look, "ms": 5, "lw": 2.0}, 0.12))
        lines.append(_over(order, f"{name}, teachers", teachers.get(name, {}), thin, 0))
    figure = draw.curves(lines, "epsilon")
    figure.axes[0].set_xticks(range(len(order)), order)
    return figure


def _over(
    order: Sequence[str],
    label: str,
    cells: Mapping[str, Sequence[float]],
    look: draw.Look,
    band: float,
) -> draw.Line:
    """A line over the budgets that are known; not all have equally many runs."""
    places = [place for place, budget in enumerate(order) if budget in cells]
    runs = zip_longest(*(cells[order[place]] for place in places), fillvalue=math.nan)
    return draw.Line(label, places, [list(run) for run in runs], look, band)


@draw.style()
def heat_figure(
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
    figure, axes = draw.canvas(11.0, 1.0 + 0.32 * len(rows))
    low, high = (0.0, 1.0) if full else (float(np.nanmin(table)), float(np.nanmax(table)))

    def text(_row: int, _column: int, value: float) -> str:
        return number(100 * value, ".0f" if full else ".1f") if np.isfinite(value) else ""

    names = [short(name, 18) for name in columns]
    draw.heat(
        axes,
        table,
        "YlGnBu",
        (low, max(high, low + 1e-6)),
        rows=[short(name, 30) for name in rows],
        columns=names,
        text=text if len(columns) <= 20 else None,
        turn=30 if max(map(len, names)) > 6 else 0,
    )
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return figure


@draw.style()
def effects_figure(effects: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Main effects: one panel per factor, a dot per cell, a bar at each choice's mean.

    Args:
        effects: Factor -> choice -> final accuracy of each cell that has it.
    """
    widths = [1 + len(choices) for choices in effects.values()]
    figure, grid = draw.panels(11.0, 3.6, 1, len(effects), width_ratios=widths)
    everything = [v for choices in effects.values() for cells in choices.values() for v in cells]
    low, high = min(everything), max(everything)
    room = 0.1 * max(high - low, 0.01)
    for axes, width, (factor, choices) in zip(grid, widths, effects.items(), strict=True):
        means = [float(np.mean(cells)) if cells else np.nan for cells in choices.values()]
        places = range(len(means))
        for place, cells in enumerate(choices.values()):
            axes.plot([place] * len(cells), cells, ".", color=draw.GREY, ms=5, alpha=0.7)
        axes.plot(places, means, color=draw.STUDENT, lw=1.2, alpha=0.5)
        axes.plot(places, means, color=draw.STUDENT, ls="", marker="_", ms=22, mew=2.6)
        axes.set_xlim(-0.6, len(means) - 0.4)
        axes.set_ylim(low - room, high + room)
        slanted: draw.Look = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(places, [short(name, 24) for name in choices], **slanted)
        draw.percents(axes, decimals=None)
        axes.tick_params(labelleft=axes is grid[0])
        axes.set_title(short(factor, 12 * width))
    grid[0].set_ylabel("final test accuracy")
    return figure
