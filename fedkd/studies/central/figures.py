"""The figures of a study of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkd.reporting import drawing as draw
from fedkd.reporting.format import short

Curves = Mapping[str, Sequence[Mapping[int, float]]]
"""Method -> epoch -> accuracy, for each seed; those of seeds under way are shorter."""


@draw.style()
def methods_figure(
    last: Mapping[str, Sequence[float]],
    best: Mapping[str, Sequence[float]],
    baseline: str,
    teachers: Mapping[str, float],
) -> Figure:
    """One row per method: each seed, their mean ± deviation, a ring at the mean of the best epochs.

    Args:
        last: Method -> accuracy after the last epoch, per seed.
        best: Method -> likewise at its best epoch.
        baseline: The method whose mean is drawn through all rows.
        teachers: Name -> accuracy, drawn through all rows.
    """
    rows = []
    for name in sorted(last, key=lambda name: -float(np.mean(last[name]))):
        values = np.asarray(last[name], dtype=float)
        mean, many = float(values.mean()), len(values) > 1
        half = float(values.std(ddof=1)) if many else 0.0
        ends = (mean - half, mean + half) if many else ()
        color = draw.GREY if name == baseline else draw.STUDENT
        ring = float(np.mean(best[name]))
        rows.append(draw.Dot(name, mean, ends, last[name] if many else (), ring, color))
    figure = draw.dots(rows, "test accuracy", label="last epoch, mean", ring="best epoch, mean")
    (axes,) = figure.axes
    for number, (name, value) in enumerate(teachers.items()):
        dashes = ("-", "-.", ":")[number % 3]
        axes.axvline(value, color=draw.ENSEMBLE, ls=dashes, lw=1.8, label=short(name, 30))
    if baseline in last:
        line: draw.Look = {"color": draw.GREY, "ls": "--", "lw": 1.2, "label": "student alone"}
        axes.axvline(float(np.mean(last[baseline])), **line)
    draw.percents(axes, "x", None)
    figure.legends.clear()
    figure.legend(loc="outside upper left", ncols=6)
    return figure


@draw.style()
def curves_figure(curves: Curves, baseline: str, teacher: float | None) -> Figure:
    """Test accuracy per epoch, one small panel per method before the student alone (grey)."""
    names = [name for name in curves if name != baseline] or list(curves)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, grid = draw.panels(11.0, 0.5 + 1.75 * rows, rows, columns)
    lines = [list(seed.values()) for seed in chain(*curves.values())]
    known = [value for line in lines for value in line[len(line) // 6 :]]
    low, high = float(np.quantile(known, 0.02)), max([*known, teacher or 0.0])
    room = 0.06 * max(high - low, 0.02)
    for axes, name in zip(grid, names):
        if baseline in curves and name != baseline:
            _draw(axes, curves[baseline], draw.TEACHER, band=0)
        _draw(axes, curves[name], draw.STUDENT, band=0.2)
        if teacher is not None:
            axes.axhline(teacher, color=draw.ENSEMBLE, lw=1.2)
        axes.set_title(short(name, 26), color=draw.INK)
        axes.set_ylim(low - room, high + room)
        draw.percents(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=8.5, color=draw.GREY)
    return figure


def _draw(axes: Axes, seeds: Sequence[Mapping[int, float]], color: str, band: float) -> None:
    common = sorted(set.intersection(*map(set, seeds)))
    runs = [[seed[epoch] for epoch in common] for seed in seeds]
    draw.Line("", common, runs, {"color": color}, band).draw(axes)
