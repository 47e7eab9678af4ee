"""The figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from fedkd.reporting.drawing import (
    CEILING,
    ENSEMBLE,
    GREY,
    INK,
    ORACLE,
    PSEUDO,
    SHADES,
    STUDENT,
    TEACHER,
    Line,
    Look,
    canvas,
    heat,
    note,
    panels,
    percents,
    scale,
    style,
)
from fedkd.reporting.format import TIMES, byte_unit, short

PHASES = {
    "describe": "#6a737d",
    "train": "#E69F00",
    "knowledge": "#0072B2",
    "evaluate": "#cfd4da",
    "fuse": "#56B4E9",
    "distil": "#009E73",
    "start-up": "#eceef1",
}
WHO = {"student": STUDENT, "ensemble": ENSEMBLE}
# Neighbours in a stack differ in lightness too, for those who cannot tell the hues apart.
_TERMS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#8a929a")
# One dark blue that everybody can tell from white: amounts are areas or shades, never hues.
_AMOUNT, _PALE = "#1f4e79", "#c9d3dc"
_SIZE = (5.6, 3.5)


# -- over rounds and epochs ------------------------------------------------------------------------


@style()
def accuracy_figure(
    rounds: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    teachers: Mapping[int, Sequence[float]],
    levels: Mapping[str, float],
) -> Figure:
    """Test accuracy per round.

    Args:
        rounds: Round numbers.
        lines: Values per round of `student`, `ensemble` and `pseudo-labels`; NaN where unknown.
        teachers: Client -> values per round: thin lines, or a band where there are many.
        levels: Horizontal lines `oracle` and `ceiling`.
    """
    figure, axes = canvas(*_SIZE)
    _teacher_lines(axes, rounds, teachers)
    looks: dict[str, Look] = {
        "pseudo-labels": {"color": PSEUDO, "ls": "--", "marker": "s", "ms": 3.5, "lw": 1.4},
        "ensemble": {"color": ENSEMBLE, "marker": "D", "ms": 4, "lw": 1.8},
        "student": {"color": STUDENT, "marker": "o", "ms": 5, "lw": 2.4},
    }
    for name, look in looks.items():
        if name in lines and np.isfinite(lines[name]).any():
            Line(name, rounds, [lines[name]], look).draw(axes)
    for name, color, dots in (("oracle", ORACLE, ":"), ("ceiling", CEILING, (0, (5, 1.5, 1, 1.5)))):
        if name in levels:
            axes.axhline(levels[name], color=color, ls=dots, lw=1.6, label=name, zorder=1.5)
    percents(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(rounds) == 1:
        axes.set_xlim(rounds[0] - 0.6, rounds[0] + 0.6)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=3)
    return figure


def _teacher_lines(
    axes: Axes, rounds: Sequence[int], teachers: Mapping[int, Sequence[float]]
) -> None:
    table = np.asarray(list(teachers.values()), dtype=float)
    if len(table) <= 12:
        thin: Look = {"color": TEACHER, "lw": 0.8, "marker": ".", "ms": 3, "alpha": 0.8}
        for number, row in enumerate(table):
            Line("" if number else "each teacher", rounds, [row], thin).draw(axes)
        return
    known = np.isfinite(table).any(axis=0)
    where = np.asarray(rounds)[known]
    low, middle, high = np.nanquantile(table[:, known], (0, 0.5, 1), axis=0)
    if len(where) == 1:
        axes.vlines(where, low, high, color=TEACHER, alpha=0.35, lw=8)
    axes.fill_between(where, low, high, color=TEACHER, alpha=0.22, lw=0, label="all teachers")
    axes.plot(where, middle, color=TEACHER, lw=1.2, marker=".", label="median teacher")


@style()
def loss_figure(
    terms: Mapping[str, Sequence[float]], rounds: Sequence[int], weights: Mapping[str, float]
) -> Figure:
    """Every loss term per epoch in a panel of its own, since their sizes differ.

    Args:
        terms: Name -> value per epoch, all rounds in a row; NaN where a term is absent.
        rounds: Round of each epoch.
        weights: Weight of a term in the sum, for its title.
    """
    names = list(terms)
    columns = 1 if len(names) <= 3 else 2
    rows = -(-len(names) // columns)
    height = max(2.6, (1.3 if columns == 1 else 1.75) * rows)
    figure, grid = panels(5.6, height, rows, columns)
    starts, label = _epochs(rounds)
    for axes, name in zip(grid, names):
        values = np.asarray(terms[name], dtype=float)
        for start in starts:
            axes.axvline(start + 0.5, color=GREY, lw=0.9, ls=":")
        color = INK if name == "total" else STUDENT
        for start, end in pairwise([0, *starts, len(rounds)]):
            one: Look = {"marker": "o", "ms": 3} if end - start == 1 else {}
            axes.plot(range(start + 1, end + 1), values[start:end], color=color, lw=1.6, **one)
        known = values[np.isfinite(values)]
        if len(known) and known.min() > 0 and known.max() > 20 * known.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own is a formula
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{name}  {TIMES} {weights[name]:g}" if name in weights else name)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel(label, fontsize=8.5, color=GREY)
    return figure


@style()
def pull_figure(pulls: Mapping[str, Sequence[float]], rounds: Sequence[int]) -> Figure:
    """Share of each term in the sum of the terms' gradient norms, per epoch.

    Args:
        pulls: Name -> norm of the weighted term's gradient on the student, per epoch; NaN where
            a term did not count.
        rounds: Round of each epoch.
    """
    table = np.nan_to_num(np.asarray(list(pulls.values()), dtype=float))
    shares = 100 * table / np.maximum(table.sum(axis=0), 1e-30)
    figure, axes = canvas(5.6, 2.6)
    colors = [_TERMS[number % len(_TERMS)] for number in range(len(pulls))]
    axes.stackplot(range(1, len(rounds) + 1), shares, labels=list(pulls), colors=colors, lw=0)
    starts, label = _epochs(rounds)
    for start in starts:
        axes.axvline(start + 0.5, color=GREY, lw=0.9, ls=":")
    axes.set_ylim(0, 100)
    axes.set_xlim(1, max(len(rounds), 2))
    axes.set_ylabel("share of the pull, %")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _epochs(rounds: Sequence[int]) -> tuple[list[int], str]:
    """Epochs after which a new round begins, and the label of the axis."""
    starts = [number for number, (a, b) in enumerate(pairwise(rounds), start=1) if a != b]
    return starts, "epoch" + (" (dotted: a new round begins)" if starts else "")


# -- classes ---------------------------------------------------------------------------------------


@style()
def class_figure(
    classes: Sequence[str], scores: Mapping[str, Sequence[float]], held: Sequence[int] | None = None
) -> Figure:
    """Accuracy per class: bars, or rows of a heat map where there are more than 20 classes.

    Args:
        classes: Class names.
        scores: `student` and maybe `ensemble` -> accuracy per class; NaN without test images.
        held: Clients that hold each class, written at the right.
    """
    if len(classes) > 20:
        return _class_heat(classes, scores)
    figure, axes = canvas(5.6, 0.9 + 0.27 * len(classes))
    height = 0.72 / len(scores)
    for number, (name, values) in enumerate(scores.items()):
        at = np.arange(len(classes)) + (number - (len(scores) - 1) / 2) * height
        known = np.nan_to_num(np.asarray(values, dtype=float))
        axes.barh(at, known, height * 0.9, color=WHO.get(name, TEACHER), label=name)
        for where, value in zip(at, values):
            if not np.isfinite(value):
                note(axes, "no test images", (0, where), (3, 0), fontsize=6.5)
    axes.set_yticks(range(len(classes)), [short(name) for name in classes])
    if held is not None:
        for where, count in enumerate(held):
            note(axes, str(count), (1.02, where), xycoords=("axes fraction", "data"))
        axes.set_title("held by", loc="right", fontsize=7.5, color=GREY)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    percents(axes, "x")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _class_heat(classes: Sequence[str], scores: Mapping[str, Sequence[float]]) -> Figure:
    """Blocks of 25 classes, the student above the ensemble; names where they can be read."""
    named = len(classes) <= 200
    across = 25 if named else 100
    blocks = [range(i, min(i + across, len(classes))) for i in range(0, len(classes), across)]
    tall = 0.3 * len(scores) + (0.75 if named else 0.1)
    figure, grid = panels(11.0, 0.4 + tall * len(blocks), len(blocks), 1)
    for axes, block in zip(grid, blocks):
        rows = np.full((len(scores), across), np.nan)
        for row, values in enumerate(scores.values()):
            rows[row, : len(block)] = np.asarray(values, dtype=float)[block.start : block.stop]
        names = [short(classes[c], 14) for c in block] if named else []
        image = heat(
            axes, rows, SHADES, (0, 1), rows=list(scores), columns=names, turn=45, fontsize=7
        )
        if not named:
            axes.set_xticks([])
        for place in range(1, len(scores)):
            axes.axhline(place - 0.5, color="white", lw=1.5)
        for column in range(1, across) if named else ():
            axes.axvline(column - 0.5, color="white", lw=0.8)
    scale(figure, image, grid, share=True, fraction=0.02)
    return figure


@style()
def partition_figure(counts: ArrayLike, classes: Sequence[str], *, title: str = "") -> Figure:
    """Images per client and class: bubbles, or a heat map where bubbles would be crowded.

    Args:
        counts: (clients, C), as `FederatedData.class_counts` gives them.
        classes: Class names, C of them.
        title: Line above the figure.
    """
    table = np.asarray(counts)
    if table.ndim != 2 or table.shape[1] != len(classes):
        raise ValueError(f"counts must be (clients, {len(classes)} classes), got {table.shape}")
    clients, number = table.shape
    crowded = number > 20 or clients > 40
    width = float(np.clip((0.16 if crowded else 0.5) * clients + 2.6, 5.5, 18))
    height = float(np.clip((0.13 if crowded else 0.36) * number + 1.9, 4.2, 15))
    share = 0.75 / (height - 1.2)
    figure, (sizes, main) = panels(width, height, 2, 1, height_ratios=(share, 1 - share))
    _draw_sizes(sizes, table.sum(1), title)
    if crowded:
        _draw_counts(figure, main, table)
    else:
        _draw_bubbles(main, table)
    main.set_xlim(-0.6, clients - 0.4)
    main.set_ylim(number - 0.4, -0.6)
    sizes.set_xlim(main.get_xlim())
    step = max(1, -(-clients // 25))
    main.set_xticks(range(0, clients, step))
    small = number * 0.15 > height - 2.0
    names = [short(name, 18) for name in classes]
    main.set_yticks(range(number), names, fontsize=5.5 if small else 8)
    main.set_xlabel("client")
    main.spines[:].set_visible(False)
    return figure


def _draw_sizes(axes: Axes, sizes: NDArray[Any], title: str) -> None:
    axes.bar(np.arange(len(sizes)), sizes, width=0.6, color=_PALE)
    axes.set_title(title, fontsize=11)
    axes.set_ylabel("images", fontsize=8)
    axes.set_ylim(0, max(1, sizes.max(initial=1)) * 1.35)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    if len(sizes) <= 24:
        for client, size in enumerate(sizes):
            note(axes, f"{int(size):,}", (client, size), (0, 2), ha="center", va="bottom")


def _draw_bubbles(axes: Axes, table: NDArray[Any]) -> None:
    client, label = np.nonzero(table)
    amount = table[client, label]
    # The largest bubble just fills its cell of about 0.36 inch (26 points).
    largest = max(1, table.max(initial=1))
    axes.scatter(client, label, s=(24**2) * amount / largest, color=_AMOUNT, lw=0)
    axes.scatter(client, label, s=1.5, color=_AMOUNT, lw=0)  # a few images stay visible
    if len(amount):
        corner: Look = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 7}
        note(axes, f"largest: {int(amount.max()):,} images", (1, 0), (0, -24), **corner)


def _draw_counts(figure: Figure, axes: Axes, table: NDArray[Any]) -> None:
    image = heat(axes, table.T, "Blues", (0, 1))
    # The square root keeps a handful of images visible beside hundreds.
    image.set_norm(PowerNorm(0.5, vmin=0, vmax=max(1, table.max(initial=1))))
    scale(figure, image, axes, "images of a class", fraction=0.05)


# -- who agrees with whom --------------------------------------------------------------------------


@style()
def agreement_figure(names: Sequence[str], table: ArrayLike, apart: int = 0) -> Figure:
    """Shares of samples on which two predictors name the same class.

    Args:
        names: The predictors.
        table: (M, M) in [0, 1].
        apart: How many at the end are no teachers; a line sets them off.
    """
    count = len(names)
    size = float(np.clip(0.34 * count + 1.5, 3.9, 7.0))
    figure, axes = canvas(size + 0.8, size)
    written = (lambda _row, _column, value: f"{100 * value:.0f}") if count <= 14 else None
    image = heat(axes, table, SHADES, (0, 1), text=written)
    axes.set_aspect("equal")
    step = max(1, -(-count // 30))
    marks = [*range(0, count - apart, step), *range(count - apart, count)]
    small = 8 if count <= 16 else 6.5
    axes.set_yticks(marks, [names[i] for i in marks], fontsize=small)
    turn = 90 if count > 6 else 0
    axes.set_xticks(marks, [names[i] for i in marks], rotation=turn, fontsize=small)
    if apart and count > apart:
        for draw in (axes.axhline, axes.axvline):
            draw(count - apart - 0.5, color="white", lw=2.5)
    scale(figure, image, axes, share=True, fraction=0.045)
    return figure


@style()
def graph_figure(
    student: NDArray[Any],
    teachers: NDArray[Any],
    *,
    blocks: Sequence[tuple[str, int]] = (),
    names: Sequence[str] = (),
) -> Figure:
    """A relation graph of the student, of the teachers, and the difference, side by side.

    Args:
        student: Edges (V, V) in [-1, 1].
        teachers: Likewise.
        blocks: Runs of vertices that belong together: (name, how many).
        names: A name per vertex; of more than 24 none is shown.
    """
    figure, grid = panels(11.0, 3.5, 1, 3)
    difference = student - teachers
    widest = max(0.1, float(np.nanmax(np.abs(difference), initial=0.0)))
    shown = [short(name, 10) for name in names] if len(names) <= 24 else []
    for axes, (title, edges, colors, limit) in zip(
        grid,
        (
            ("student", student, "RdBu_r", 1.0),
            ("teachers, fused", teachers, "RdBu_r", 1.0),
            ("student \N{MINUS SIGN} teachers", difference, "PuOr", widest),
        ),
    ):
        turn = 90 if max(map(len, shown), default=0) > 2 else 0
        limits = (-limit, limit)
        image = heat(axes, edges, colors, limits, rows=shown, columns=shown, turn=turn, fontsize=7)
        axes.set_aspect("equal")
        axes.set_title(title)
        if blocks:
            _mark_blocks(axes, blocks)
        elif not shown:
            axes.set_xticks([])
            axes.set_yticks([])
        scale(figure, image, axes, fraction=0.046)
    return figure


def _mark_blocks(axes: Axes, blocks: Sequence[tuple[str, int]]) -> None:
    ends = np.cumsum([count for _, count in blocks])
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", lw=0.7)
        axes.axvline(end - 0.5, color="white", lw=0.7)
    middles = [end - count / 2 - 0.5 for end, (_, count) in zip(ends, blocks)]
    text = [short(name, 10) for name, _ in blocks]
    turn = 90 if max(map(len, text), default=0) > 2 else 0
    axes.set_xticks(middles, text, fontsize=7, rotation=turn)
    axes.set_yticks(middles, text, fontsize=7)


# -- calibration -----------------------------------------------------------------------------------


@style()
def calibration_figure(sets: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Reliability diagrams: accuracy over confidence, with how many samples fall in each bin.

    Args:
        sets: Name -> `confidence`, `accuracy`, `counts` per bin and `ece`.
    """
    columns = max(1, len(sets))
    figure, grid = panels(*_SIZE, 2, columns, height_ratios=(4, 1))
    for place, (name, bins) in enumerate(sets.items()):
        top, below = grid[place], grid[columns + place]
        right, sure, counts = (
            np.asarray(bins[key], dtype=float) for key in ("accuracy", "confidence", "counts")
        )
        width = 1 / len(counts)
        left = np.arange(len(counts)) * width
        drawn: Look = {"width": width * 0.92, "align": "edge", "color": WHO.get(name, TEACHER)}
        top.bar(left, np.nan_to_num(right), alpha=0.3, **drawn)
        top.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1)
        known = counts > 0
        top.plot(sure[known], right[known], color=drawn["color"], marker="o", ms=3.5, lw=1.4)
        top.set_title(f"{name} · ECE {100 * float(bins['ece']):.1f} %")
        top.set_ylim(0, 1)
        top.set_xticks([0, 0.5, 1], [])
        below.bar(left, counts / max(counts.sum(), 1), **drawn)
        below.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        below.yaxis.set_major_locator(MaxNLocator(2))
        below.set_xlabel("confidence")
        for axes in (top, below):
            axes.set_xlim(0, 1)
            percents(axes)
    grid[0].set_ylabel("accuracy")
    grid[columns].set_ylabel("samples")
    return figure


# -- costs -----------------------------------------------------------------------------------------


@style()
def traffic_figure(
    rounds: Sequence[int],
    up: Mapping[str, Sequence[float]],
    down: Mapping[str, Sequence[float]],
    measurement: Sequence[str] = ("evaluate",),
) -> Figure:
    """Bytes per round: what clients send above the line, what they are sent below it.

    Args:
        rounds: Round numbers.
        up: Phase -> bytes from all clients, per round.
        down: Phase -> bytes to all clients, per round.
        measurement: Phases that only measure; drawn apart, in a scale of their own.
    """
    groups = {
        "the method": [phase for phase in up if phase not in measurement],
        "measurement": [phase for phase in up if phase in measurement],
    }
    groups = {title: phases for title, phases in groups.items() if phases}
    figure, grid = panels(*_SIZE, 1, len(groups))
    for axes, (title, phases) in zip(grid, groups.items()):
        stacks = [np.sum([way[phase] for phase in phases], axis=0) for way in (up, down)]
        unit, factor = byte_unit(max(1.0, *(float(stack.max()) for stack in stacks)))
        for sign, way in ((1, up), (-1, down)):
            base = np.zeros(len(rounds))
            for phase in phases:
                height = sign * np.asarray(way[phase], dtype=float) / factor
                look: Look = {"color": PHASES.get(phase, TEACHER), "edgecolor": "white", "lw": 0.5}
                if phase in measurement:
                    look["hatch"] = "////"
                label = phase if sign == 1 else None
                axes.bar(rounds, height, 0.7, bottom=base, label=label, **look)
                base = base + height
        axes.axhline(0, color=INK, lw=0.9)
        axes.set_title(f"{title}, {unit}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_xlabel("round")
        axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
    grid[0].set_ylabel("← to clients    from clients →")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


@style()
def cost_figure(
    sent: Sequence[float], accuracy: Sequence[float], rounds: Sequence[int], transfer: float | None
) -> Figure:
    """Student accuracy over the knowledge bytes all clients have sent so far.

    Args:
        sent: Cumulative bytes after each round.
        accuracy: The student's test accuracy after each round.
        rounds: Round numbers, written beside the points.
        transfer: Bytes of shipping the transfer set once to every client, for scale.
    """
    figure, axes = canvas(*_SIZE)
    unit, factor = byte_unit(max([*sent, 1.0]))
    across = np.asarray(sent, dtype=float) / factor
    axes.plot(across, accuracy, color=STUDENT, marker="o", ms=5, lw=2)
    step = max(1, -(-len(rounds) // 10))
    for x, y, number in list(zip(across, accuracy, rounds))[::step]:
        if np.isfinite(y):
            note(axes, str(number), (x, y), (0, 6), ha="center", va="baseline")
    widest = max(float(across.max()), (transfer or 0) / factor)
    if transfer:
        place = transfer / factor
        axes.axvline(place, color=PSEUDO, ls="--", lw=1.3)
        side: Look = {"ha": "right" if place > 0.5 * widest else "left", "va": "baseline"}
        above: Look = {"xycoords": ("data", "axes fraction"), "color": PSEUDO}
        note(axes, "transfer set, once to every client", (place, 1.02), **above, **side)
    axes.set_xlim(0, widest * 1.08)
    low, high = axes.get_ylim()
    spare = max(0.0, 0.1 - (high - low)) / 2  # a point more or less must not look like a cliff
    axes.set_ylim(max(-0.01, low - spare), min(1.02, high + spare + 0.15 * (high - low)))
    percents(axes)
    axes.set_xlabel(f"knowledge sent by all clients so far, {unit}")
    axes.set_ylabel("student accuracy")
    return figure


@style()
def time_figure(bars: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seconds per phase, one stacked bar per name."""
    figure, axes = canvas(5.6, 1.2 + 0.3 * len(bars))
    longest = max([*(sum(spent.values()) for spent in bars.values()), 1e-9])
    unit, seconds = ("minutes", 60.0) if longest >= 300 else ("seconds", 1.0)
    base = np.zeros(len(bars))
    for phase in dict.fromkeys(phase for spent in bars.values() for phase in spent):
        width = np.array([spent.get(phase, 0.0) / seconds for spent in bars.values()])
        look: Look = {"color": PHASES.get(phase, TEACHER), "edgecolor": "white", "lw": 0.6}
        axes.barh(range(len(bars)), width, 0.62, left=base, label=phase, **look)
        base = base + width
    for row, total in enumerate(base):
        note(axes, f"{total:.1f}", (total, row), (4, 0))
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xlim(0, longest / seconds * 1.1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)
    figure.legend(loc="outside upper left", ncols=6, handlelength=1, columnspacing=1)
    return figure
