"""The report's pictures: plain numbers in, a matplotlib `Figure` out, `svg` makes it inline HTML.

No pyplot, so nothing global is left behind; equal numbers give equal bytes. Colours are Okabe and
Ito's, which people with colour-blindness can tell apart, and every line also differs in style.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from fedkd.training.evaluation import Calibration

STUDENT, ENSEMBLE, ORACLE, CEILING = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
PSEUDO, TEACHER, INK, GREY, LINE = "#D55E00", "#8a929a", "#24292f", "#6a737d", "#e4e7eb"
PHASES = {
    "describe": "#6a737d", "train": "#E69F00", "knowledge": "#0072B2", "evaluate": "#cfd4da",
    "fuse": "#56B4E9", "distil": "#009E73", "start-up": "#eceef1",
}  # fmt: skip
# Neighbours in a stack differ in lightness too, for those who cannot tell the hues apart.
_TERMS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#8a929a")

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, small, in the page's own font
    "text.parse_math": False,  # class names come from outside; `$` must not start a formula
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#aab1b9",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.solid_capstyle": "round",
    "image.interpolation": "none",  # embed the pixels themselves, however few
}


@contextmanager
def style() -> Iterator[None]:
    """The look of all pictures; create and render figures inside."""
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts
        yield


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element: same bytes for the same picture, no ids but its own.

    Args:
        figure: The picture.
        name: Unique on the page; keeps the references of two pictures apart.
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # matplotlib numbers groups alike in every figure
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text, count=2)  # HTML needs none
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text, count=1)


# -- over rounds and epochs ------------------------------------------------------------------


def accuracy_picture(
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
    figure, axes = canvas(5.6, 3.5)
    _teacher_lines(axes, rounds, teachers)
    looks: dict[str, dict[str, Any]] = {
        "pseudo-labels": {"color": PSEUDO, "ls": "--", "marker": "s", "ms": 3.5, "lw": 1.4},
        "ensemble": {"color": ENSEMBLE, "marker": "D", "ms": 4, "lw": 1.8},
        "student": {"color": STUDENT, "marker": "o", "ms": 5, "lw": 2.4},
    }
    for name, look in looks.items():
        if name in lines and np.isfinite(lines[name]).any():
            axes.plot(rounds, lines[name], label=name, **look)
    for name, color in (("oracle", ORACLE), ("ceiling", CEILING)):
        if name in levels:
            dots = ":" if name == "oracle" else (0, (5, 1.5, 1, 1.5))
            axes.axhline(levels[name], color=color, ls=dots, lw=1.6, label=name, zorder=1.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
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
    if not teachers:
        return
    table = np.asarray(list(teachers.values()), dtype=float)
    if len(table) <= 12:
        for number, row in enumerate(table):
            label = "each teacher" if number == 0 else None
            axes.plot(rounds, row, color=TEACHER, lw=0.8, marker=".", ms=3, alpha=0.8, label=label)
        return
    known = np.isfinite(table).any(axis=0)
    where = np.asarray(rounds)[known]
    low, middle, high = np.nanquantile(table[:, known], (0, 0.5, 1), axis=0)
    if len(where) == 1:
        axes.vlines(where, low, high, color=TEACHER, alpha=0.35, lw=8)
    axes.fill_between(where, low, high, color=TEACHER, alpha=0.22, lw=0, label="all teachers")
    axes.plot(where, middle, color=TEACHER, lw=1.2, marker=".", label="median teacher")


def loss_picture(
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
    figure, first = canvas(
        5.6, max(2.6, (1.3 if columns == 1 else 1.75) * rows), grid=(rows, columns)
    )
    panels = np.atleast_1d(np.asarray(first, dtype=object)).ravel()
    epochs = np.arange(1, len(rounds) + 1)
    starts = [i for i, (a, b) in enumerate(pairwise(rounds), start=1) if a != b]
    for axes, name in zip(panels, names):
        values = np.asarray(terms[name], dtype=float)
        for start in starts:
            axes.axvline(start + 0.5, color=GREY, lw=0.9, ls=":")
        color = INK if name == "total" else STUDENT
        for start, end in pairwise([0, *starts, len(epochs)]):
            one = {"marker": "o", "ms": 3} if end - start == 1 else {}
            axes.plot(epochs[start:end], values[start:end], color=color, lw=1.6, **one)
        known = values[np.isfinite(values)]
        if len(known) and known.min() > 0 and known.max() > 20 * known.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own is a formula
            axes.yaxis.set_minor_formatter(NullFormatter())
        weight = f"  \N{MULTIPLICATION SIGN} {weights[name]:g}" if name in weights else ""
        axes.set_title(f"{name}{weight}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    label = "epoch" + (" (dotted: a new round begins)" if starts else "")
    figure.supxlabel(label, fontsize=8.5, color=GREY)
    return figure


def pull_picture(pulls: Mapping[str, Sequence[float]], rounds: Sequence[int]) -> Figure:
    """Share of each term in the sum of the terms' gradient norms, per epoch.

    Args:
        pulls: Name -> norm of the weighted term's gradient on the student, per epoch; NaN where
            a term did not count.
        rounds: Round of each epoch.
    """
    table = np.nan_to_num(np.asarray(list(pulls.values()), dtype=float))
    shares = 100 * table / np.maximum(table.sum(axis=0), 1e-30)
    epochs = np.arange(1, len(rounds) + 1)
    figure, axes = canvas(5.6, 2.6)
    colors = [_TERMS[number % len(_TERMS)] for number in range(len(pulls))]
    axes.stackplot(epochs, shares, labels=list(pulls), colors=colors, lw=0)
    for start, (before, after) in enumerate(pairwise(rounds), start=1):
        if before != after:
            axes.axvline(start + 0.5, color=GREY, lw=0.9, ls=":")
    axes.set_ylim(0, 100)
    axes.set_xlim(epochs[0], max(epochs[-1], 2))
    axes.set_ylabel("share of the pull, %")
    axes.set_xlabel("epoch" + (" (dotted: a new round begins)" if len(set(rounds)) > 1 else ""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


# -- classes -----------------------------------------------------------------------------------


def class_picture(
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
    place = np.arange(len(classes), dtype=float)
    colors = {"student": STUDENT, "ensemble": ENSEMBLE}
    for number, (name, values) in enumerate(scores.items()):
        at = place + (number - (len(scores) - 1) / 2) * height
        known = np.nan_to_num(np.asarray(values, dtype=float))
        axes.barh(at, known, height * 0.9, color=colors.get(name, TEACHER), label=name)
        for where, value in zip(at, values):
            if not np.isfinite(value):
                axes.annotate(
                    "no test images", (0, where), (3, 0), textcoords="offset points",
                    va="center", fontsize=6.5, color=GREY,
                )  # fmt: skip
    axes.set_yticks(place, [short(name) for name in classes])
    for where, count in enumerate(held if held is not None else ()):
        axes.annotate(
            str(count), (1.02, where), xycoords=("axes fraction", "data"), va="center",
            fontsize=7.5, color=GREY,
        )  # fmt: skip
    if held is not None:
        axes.set_title("held by", loc="right", fontsize=7.5, color=GREY)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _class_heat(classes: Sequence[str], scores: Mapping[str, Sequence[float]]) -> Figure:
    """Blocks of 25 classes, the student above the ensemble; names where they can be read."""
    named = len(classes) <= 200
    across = 25 if named else 100
    blocks = [range(i, min(i + across, len(classes))) for i in range(0, len(classes), across)]
    tall = 0.3 * len(scores) + (0.75 if named else 0.1)
    figure, first = canvas(11.0, 0.4 + tall * len(blocks), grid=(len(blocks), 1))
    panels = np.atleast_1d(np.asarray(first, dtype=object)).ravel()
    image: Any = None
    for axes, block in zip(panels, blocks):
        rows = np.full((len(scores), across), np.nan)
        for row, values in enumerate(scores.values()):
            rows[row, : len(block)] = np.asarray(values, dtype=float)[block.start : block.stop]
        image = axes.imshow(rows, aspect="auto", cmap=_SHADES, vmin=0, vmax=1)
        axes.set_facecolor("#f3f4f6")
        axes.set_yticks(range(len(scores)), list(scores))
        marks = list(range(len(block))) if named else []
        axes.set_xticks(
            marks, [short(classes[block.start + i], 14) for i in marks], rotation=45,
            ha="right", rotation_mode="anchor", fontsize=7,
        )  # fmt: skip
        _bare(axes)
        if len(scores) > 1:
            axes.axhline(0.5, color="white", lw=1.5)
        for column in range(1, across) if named else ():
            axes.axvline(column - 0.5, color="white", lw=0.8)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.02, pad=0.01, shrink=0.8)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    return figure


# -- who agrees with whom ------------------------------------------------------------------------


def agreement_picture(names: Sequence[str], table: ArrayLike, apart: int = 0) -> Figure:
    """Shares of samples on which two predictors name the same class.

    Args:
        names: The predictors.
        table: (M, M) in [0, 1].
        apart: How many at the end are no teachers; a line sets them off.
    """
    values = np.asarray(table, dtype=float)
    count = len(names)
    size = float(np.clip(0.34 * count + 1.5, 3.9, 7.0))
    figure, axes = canvas(size + 0.8, size)
    image = axes.imshow(values, cmap=_SHADES, vmin=0, vmax=1)
    step = max(1, -(-count // 30))
    marks = [*range(0, count - apart, step), *range(count - apart, count)]
    small = {"fontsize": 8 if count <= 16 else 6.5}
    axes.set_yticks(marks, [names[i] for i in marks], **small)
    axes.set_xticks(marks, [names[i] for i in marks], rotation=90 if count > 6 else 0, **small)
    _bare(axes)
    if apart and count > apart:
        for draw in (axes.axhline, axes.axvline):
            draw(count - apart - 0.5, color="white", lw=2.5)
    if count <= 14:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < 0.55 else INK
            axes.annotate(
                f"{100 * value:.0f}", (column, row), ha="center", va="center", color=color,
                fontsize=7.5,
            )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    return figure


def graph_picture(
    student: NDArray[Any],
    teachers: NDArray[Any],
    *,
    blocks: Sequence[tuple[str, int]] | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """A relation graph of the student, of the teachers, and the difference, side by side.

    Args:
        student: Edges (V, V) in [-1, 1].
        teachers: Likewise.
        blocks: Runs of vertices that belong together: (name, how many).
        names: A name per vertex.
    """
    figure, panels = canvas(11.0, 3.5, grid=(1, 3))
    difference = student - teachers
    widest = max(0.1, float(np.nanmax(np.abs(difference), initial=0.0)))
    pictures = (
        ("student", student, "RdBu_r", 1.0),
        ("teachers, fused", teachers, "RdBu_r", 1.0),
        ("student \N{MINUS SIGN} teachers", difference, "PuOr", widest),
    )
    for axes, (title, edges, colors, limit) in zip(panels, pictures):
        image = axes.imshow(edges, cmap=colors, vmin=-limit, vmax=limit)
        axes.set_title(title)
        _bare(axes)
        if blocks is not None:
            _mark_blocks(axes, blocks)
        elif names is not None and len(names) <= 24:
            text = [short(name, 10) for name in names]
            longest = max(map(len, text))
            axes.set_xticks(range(len(names)), text, rotation=90 if longest > 2 else 0, fontsize=7)
            axes.set_yticks(range(len(names)), text, fontsize=7)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, shrink=0.8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    return figure


def _mark_blocks(axes: Axes, blocks: Sequence[tuple[str, int]]) -> None:
    ends = np.cumsum([count for _, count in blocks])
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", lw=0.7)
        axes.axvline(end - 0.5, color="white", lw=0.7)
    middles = [end - count / 2 - 0.5 for end, (_, count) in zip(ends, blocks)]
    text = [short(name, 10) for name, _ in blocks]
    longest = max(map(len, text), default=0)
    axes.set_xticks(middles, text, fontsize=7, rotation=90 if longest > 2 else 0)
    axes.set_yticks(middles, text, fontsize=7)


# -- calibration -----------------------------------------------------------------------------


def calibration_picture(sets: Mapping[str, Calibration]) -> Figure:
    """Reliability diagrams: accuracy over confidence, with how many samples fall in each bin.

    Args:
        sets: Name -> its calibration.
    """
    figure, panels = canvas(5.6, 3.5, grid=(2, max(1, len(sets))), height_ratios=(4, 1))
    panels = np.asarray(panels, dtype=object).reshape(2, -1)
    colors = {"student": STUDENT, "ensemble": ENSEMBLE}
    for column, (name, bins) in enumerate(sets.items()):
        top, below = panels[:, column]
        right = np.asarray(bins.accuracy, dtype=float)
        sure = np.asarray(bins.confidence, dtype=float)
        counts = np.asarray(bins.counts, dtype=float)
        width = 1 / len(counts)
        left = np.arange(len(counts)) * width
        color = colors.get(name, TEACHER)
        top.bar(left, np.nan_to_num(right), width * 0.92, align="edge", color=color, alpha=0.3)
        top.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1)
        known = counts > 0
        top.plot(sure[known], right[known], color=color, marker="o", ms=3.5, lw=1.4)
        top.set_title(f"{name} · ECE {100 * bins.ece:.1f} %")
        top.set_xlim(0, 1)
        top.set_ylim(0, 1)
        top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        top.set_xticks([0, 0.5, 1], [])
        below.bar(left, counts / max(counts.sum(), 1), width * 0.92, align="edge", color=color)
        below.set_xlim(0, 1)
        below.set_ylim(0, None)
        below.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        below.yaxis.set_major_locator(MaxNLocator(2))
        below.set_xlabel("confidence")
        if column == 0:
            top.set_ylabel("accuracy")
            below.set_ylabel("samples")
    return figure


# -- costs ---------------------------------------------------------------------------------------


def traffic_picture(
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
    method = [phase for phase in up if phase not in measurement]
    groups = {"the method": method, "measurement": [p for p in up if p in measurement]}
    groups = {title: phases for title, phases in groups.items() if phases}
    figure, panels = canvas(5.6, 3.5, grid=(1, len(groups)))
    for axes, (title, phases) in zip(np.atleast_1d(panels), groups.items()):
        stacks = [np.sum([way[phase] for phase in phases], axis=0) for way in (up, down)]
        unit, scale = byte_unit(max(1.0, *(float(stack.max()) for stack in stacks)))
        for sign, way in ((1, up), (-1, down)):
            base = np.zeros(len(rounds))
            for phase in phases:
                height = sign * np.asarray(way[phase], dtype=float) / scale
                axes.bar(
                    rounds, height, 0.7, bottom=base, color=PHASES.get(phase, TEACHER),
                    label=phase if sign == 1 else None, edgecolor="white", lw=0.5,
                    hatch="////" if phase in measurement else None,
                )  # fmt: skip
                base = base + height
        axes.axhline(0, color=INK, lw=0.9)
        axes.set_title(f"{title}, {unit}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_xlabel("round")
        axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
    np.atleast_1d(panels)[0].set_ylabel("← to clients    from clients →")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def cost_picture(
    sent: Sequence[float], accuracy: Sequence[float], rounds: Sequence[int], transfer: float | None
) -> Figure:
    """Student accuracy over the knowledge bytes all clients have sent so far.

    Args:
        sent: Cumulative bytes after each round.
        accuracy: The student's test accuracy after each round.
        rounds: Round numbers, written beside the points.
        transfer: Bytes of shipping the transfer set once to every client, for scale.
    """
    figure, axes = canvas(5.6, 3.5)
    unit, scale = byte_unit(max([*sent, 1.0]))
    across = np.asarray(sent, dtype=float) / scale
    axes.plot(across, accuracy, color=STUDENT, marker="o", ms=5, lw=2)
    step = max(1, -(-len(rounds) // 10))
    for x, y, number in list(zip(across, accuracy, rounds))[::step]:
        if np.isfinite(y):
            axes.annotate(
                str(number), (x, y), (0, 6), textcoords="offset points", ha="center",
                fontsize=7.5, color=GREY,
            )  # fmt: skip
    if transfer:
        axes.axvline(transfer / scale, color=PSEUDO, ls="--", lw=1.3)
        far = transfer / scale > 0.5 * max(float(across.max()), transfer / scale)
        axes.annotate(
            "transfer set, once to every client", (transfer / scale, 1.02),
            xycoords=("data", "axes fraction"), ha="right" if far else "left", fontsize=7.5,
            color=PSEUDO,
        )  # fmt: skip
    axes.set_xlim(0, max(float(across.max()), (transfer or 0) / scale) * 1.08)
    low, high = axes.get_ylim()
    spare = max(0.0, 0.1 - (high - low)) / 2  # a point more or less must not look like a cliff
    axes.set_ylim(max(-0.01, low - spare), min(1.02, high + spare + 0.15 * (high - low)))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"knowledge sent by all clients so far, {unit}")
    axes.set_ylabel("student accuracy")
    return figure


def time_picture(bars: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seconds per phase, one stacked bar per name."""
    figure, axes = canvas(5.6, 1.2 + 0.3 * len(bars))
    names = list(bars)
    phases = list(dict.fromkeys(phase for spent in bars.values() for phase in spent))
    longest = max([*(sum(spent.values()) for spent in bars.values()), 1e-9])
    minutes = longest >= 300
    scale = 60.0 if minutes else 1.0
    base = np.zeros(len(names))
    for phase in phases:
        width = np.array([spent.get(phase, 0.0) / scale for spent in bars.values()])
        axes.barh(
            range(len(names)), width, 0.62, left=base, color=PHASES.get(phase, TEACHER),
            label=phase, edgecolor="white", lw=0.6,
        )  # fmt: skip
        base = base + width
    for row, total in enumerate(base):
        axes.annotate(
            f"{total:.1f}", (total, row), (4, 0), textcoords="offset points", va="center",
            fontsize=7.5, color=GREY,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, longest / scale * 1.1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("minutes" if minutes else "seconds")
    figure.legend(loc="outside upper left", ncols=6, handlelength=1, columnspacing=1)
    return figure


# -- shared --------------------------------------------------------------------------------------

# Dark blue to pale yellow through grey-blue: order survives in grey and for every eye.
_SHADES = LinearSegmentedColormap.from_list("shades", ("#1a3a66", "#5f93b5", "#c9dccf", "#fcf3b8"))


def byte_unit(size: float) -> tuple[str, float]:
    """The unit in which `size` bytes read well, and its bytes (powers of 1,000)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return unit, scale
    return "B", 1.0


def short(name: str, length: int = 16) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= length else name[: length - 1] + "…"


def canvas(width: float, height: float, grid: tuple[int, int] = (1, 1), **ratios: Any) -> Any:
    """An empty figure and its axes (an array of them for a grid)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(*grid, gridspec_kw=ratios or None)
    return figure, panels


def _bare(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
