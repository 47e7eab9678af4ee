"""The pictures of a study: plain numbers in, a matplotlib `Figure` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedkd.reporting.figures import CEILING, ENSEMBLE, GREY, INK, STUDENT, TEACHER, canvas, short


def methods_picture(
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
    if baseline in last:
        axes.axvline(float(np.mean(last[baseline])), color=GREY, ls="--", lw=1.2)
    styles = ("-", "-.", ":")
    for number, (name, value) in enumerate(teachers.items()):
        axes.axvline(
            value, color=ENSEMBLE, ls=styles[number % len(styles)], lw=1.8, label=short(name, 30)
        )
    for row, name in enumerate(names):
        values = np.asarray(last[name], dtype=float)
        color = GREY if name == baseline else STUDENT
        mean = float(values.mean())
        if len(values) > 1:
            spread = float(values.std(ddof=1))
            axes.plot([mean - spread, mean + spread], [row, row], color=color, lw=5, alpha=0.25)
            axes.plot(values, [row] * len(values), ".", color=color, ms=4.5, alpha=0.8)
        axes.plot([mean], [row], marker="|", ms=13, mew=2.4, color=color)
        axes.plot(
            [float(np.mean(best[name]))], [row], marker="o", ms=6, mfc="none", mew=1.2,
            color=CEILING,
        )  # fmt: skip
    axes.plot([], [], marker="|", ms=11, mew=2.4, ls="", color=STUDENT, label="last epoch, mean")
    if any(len(values) > 1 for values in last.values()):
        axes.plot([], [], ".", color=STUDENT, ms=5, label="each seed")
    axes.plot([], [], marker="o", ms=6, mfc="none", ls="", color=CEILING, label="best epoch, mean")
    axes.plot([], [], color=GREY, ls="--", lw=1.2, label="student alone")
    axes.set_yticks(range(len(names)), [short(name, 24) for name in names])
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel("test accuracy")
    figure.legend(loc="outside upper left", ncols=6)
    return figure


def curves_picture(
    curves: Mapping[str, Sequence[Mapping[int, float]]], baseline: str, teacher: float | None
) -> Figure:
    """Test accuracy per epoch, one small panel per method before the student alone (grey).

    Args:
        curves: Method -> epoch -> accuracy, per seed; seeds under way may be shorter.
        baseline: The method drawn in every panel.
        teacher: The best teacher's accuracy.
    """
    names = [name for name in curves if name != baseline] or list(curves)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, grid = canvas(11.0, 0.5 + 1.75 * rows, grid=(rows, columns))
    panels = np.atleast_1d(np.asarray(grid, dtype=object)).ravel()
    lines = [list(seed.values()) for seeds in curves.values() for seed in seeds]
    known = [value for line in lines for value in line[len(line) // 6 :]]
    low, high = float(np.quantile(known, 0.02)), max([*known, teacher or 0.0])
    room = 0.06 * max(high - low, 0.02)
    for axes, name in zip(panels, names):
        if baseline in curves and name != baseline:
            for epochs, _, middle, _ in _bands(curves[baseline]):
                axes.plot(epochs, middle, color=TEACHER, lw=1.2)
        for epochs, lowest, middle, highest in _bands(curves[name]):
            axes.fill_between(epochs, lowest, highest, color=STUDENT, alpha=0.2, lw=0)
            axes.plot(epochs, middle, color=STUDENT, lw=1.6)
        if teacher is not None:
            axes.axhline(teacher, color=ENSEMBLE, lw=1.2)
        axes.set_title(short(name, 26), color=INK)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=8.5, color=GREY)
    return figure


def _bands(
    seeds: Sequence[Mapping[int, float]],
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(epochs, lowest, mean, highest) over the seeds, as far as the shortest goes."""
    common = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not common:
        return []
    table = np.asarray([[seed[epoch] for epoch in common] for seed in seeds], dtype=float)
    epochs = np.asarray(common)
    return [(epochs, table.min(axis=0), table.mean(axis=0), table.max(axis=0))]
