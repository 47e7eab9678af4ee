"""The figures of a study of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkd.reporting.drawing import (
    CEILING,
    ENSEMBLE,
    GREY,
    INK,
    STUDENT,
    TEACHER,
    Line,
    Look,
    canvas,
    panels,
    percents,
    style,
)
from fedkd.reporting.format import short

Curves = Mapping[str, Sequence[Mapping[int, float]]]
"""Method -> epoch -> accuracy, for each seed; those of seeds under way are shorter."""


@style()
def methods_figure(
    last: Mapping[str, Sequence[float]],
    best: Mapping[str, Sequence[float]],
    baseline: str,
    teachers: Mapping[str, float],
) -> Figure:
    """One row per method: a dot per seed, a bar at the mean, a ring at the mean of the best epochs.

    Args:
        last: Method -> accuracy after the last epoch, per seed.
        best: Method -> likewise at its best epoch.
        baseline: The method whose mean is drawn through all rows.
        teachers: Name -> accuracy, drawn through all rows.
    """
    names = sorted(last, key=lambda name: float(np.mean(last[name])))
    figure, axes = canvas(11.0, 1.3 + 0.3 * len(names))
    for number, (name, value) in enumerate(teachers.items()):
        dashes = ("-", "-.", ":")[number % 3]
        axes.axvline(value, color=ENSEMBLE, ls=dashes, lw=1.8, label=short(name, 30))
    mean: Look = {"marker": "|", "ms": 12, "mew": 2.4, "ls": ""}
    ring: Look = {"marker": "o", "ms": 6, "mfc": "none", "mew": 1.2, "ls": "", "color": CEILING}
    if baseline in last:
        line: Look = {"color": GREY, "ls": "--", "lw": 1.2, "label": "student alone"}
        axes.axvline(float(np.mean(last[baseline])), **line)
    for row, name in enumerate(names):
        values = np.asarray(last[name], dtype=float)
        color = GREY if name == baseline else STUDENT
        if len(values) > 1:
            ends = values.mean() + values.std(ddof=1) * np.array([-1, 1])
            axes.plot(ends, [row, row], color=color, lw=5, alpha=0.25)
            axes.plot(values, [row] * len(values), ".", color=color, ms=4.5, alpha=0.8)
        axes.plot([values.mean()], [row], color=color, **mean)
        axes.plot([np.mean(best[name])], [row], **ring)
    axes.plot([], [], color=STUDENT, label="last epoch, mean", **mean)
    if any(len(values) > 1 for values in last.values()):
        axes.plot([], [], ".", color=STUDENT, ms=5, label="each seed")
    axes.plot([], [], label="best epoch, mean", **ring)
    axes.set_yticks(range(len(names)), [short(name, 24) for name in names])
    axes.set_ylim(-0.7, len(names) - 0.3)
    percents(axes, "x", None)
    axes.set_xlabel("test accuracy")
    figure.legend(loc="outside upper left", ncols=6)
    return figure


@style()
def curves_figure(curves: Curves, baseline: str, teacher: float | None) -> Figure:
    """Test accuracy per epoch, one small panel per method before the student alone (grey).

    Args:
        curves: What is known of each method.
        baseline: The method drawn in every panel.
        teacher: The best teacher's accuracy.
    """
    names = [name for name in curves if name != baseline] or list(curves)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, grid = panels(11.0, 0.5 + 1.75 * rows, rows, columns)
    lines = [list(seed.values()) for seed in chain(*curves.values())]
    known = [value for line in lines for value in line[len(line) // 6 :]]
    low, high = float(np.quantile(known, 0.02)), max([*known, teacher or 0.0])
    room = 0.06 * max(high - low, 0.02)
    for axes, name in zip(grid, names):
        if baseline in curves and name != baseline:
            _draw(axes, curves[baseline], TEACHER, band=0)
        _draw(axes, curves[name], STUDENT, band=0.2)
        if teacher is not None:
            axes.axhline(teacher, color=ENSEMBLE, lw=1.2)
        axes.set_title(short(name, 26), color=INK)
        axes.set_ylim(low - room, high + room)
        percents(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=8.5, color=GREY)
    return figure


def _draw(axes: Axes, seeds: Sequence[Mapping[int, float]], color: str, band: float) -> None:
    common = sorted(set.intersection(*map(set, seeds)))
    runs = [[seed[epoch] for epoch in common] for seed in seeds]
    Line("", common, runs, {"color": color}, band).draw(axes)
