"""The figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from fedkd.config import Term
from fedkd.reporting import drawing as draw
from fedkd.reporting.format import TIMES, as_float, byte_unit, percent, short

PHASES = {
    "describe": "#6a737d",
    "train": "#E69F00",
    "keys": "#CC79A7",
    "masked": "#0072B2",
    "knowledge": "#0072B2",
    "evaluate": "#cfd4da",
    "fuse": "#56B4E9",
    "distil": "#009E73",
    "start-up": "#eceef1",
}
WHO = {"student": draw.STUDENT, "ensemble": draw.ENSEMBLE}
# Neighbours in a stack differ in lightness too, for those who cannot tell the hues apart.
_TERMS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#8a929a")
_SIZE = (5.6, 3.5)


@draw.style()
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
    looks: dict[str, draw.Look] = {
        "pseudo-labels": {"color": draw.PSEUDO, "ls": "--", "marker": "s", "ms": 3.5, "lw": 1.4},
        "ensemble": {"color": draw.ENSEMBLE, "marker": "D", "ms": 4, "lw": 1.8},
        "student": {"color": draw.STUDENT, "marker": "o", "ms": 5, "lw": 2.4},
    }
    thin: draw.Look = {"color": draw.TEACHER, "lw": 0.8, "marker": ".", "ms": 3, "alpha": 0.8}
    each = len(teachers) <= 12
    drawn = [
        draw.Line(
            "" if place else "each teacher",
            rounds,
            [values],
            thin,
            0,
            "each teacher",
            f"teacher {client}",
        )
        for place, (client, values) in enumerate(teachers.items() if each else ())
    ]
    if not each:
        drawn.append(draw.Line("teachers, mean", rounds, list(teachers.values()), thin, 0.22))
    drawn += [
        draw.Line(name, rounds, [lines[name]], look)
        for name, look in looks.items()
        if np.isfinite(lines[name]).any()
    ]
    colors = {"oracle": (draw.ORACLE, ":"), "ceiling": (draw.CEILING, (0, (5, 1.5, 1, 1.5)))}
    bounds: list[tuple[float, draw.Look]] = [
        (value, {"label": name, "color": colors[name][0], "ls": colors[name][1], "lw": 1.6})
        for name, value in levels.items()
    ]
    figure = draw.curves(drawn, "round", levels=bounds, size=_SIZE)
    (axes,) = figure.axes
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(rounds) == 1:
        axes.set_xticks(rounds)
    axes.set_xlim(rounds[0] - 0.3, rounds[-1] + 0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))
    return figure


def training_figures(
    losses: Sequence[float],
    terms: Sequence[Mapping[str, float]],
    gradients: Sequence[Mapping[str, float | None] | None],
    rounds: Sequence[int],
    configured: Sequence[Term],
) -> list[Figure]:
    """Loss terms per epoch, and the pull of each where it was measured.

    Args:
        losses: The sum, per epoch.
        terms: Term -> value before its weight, per epoch.
        gradients: Term -> length of its weighted gradient, per epoch; None where not measured.
        rounds: Round of each epoch.
        configured: The terms, with their weights.
    """
    names = list(dict.fromkeys(name for epoch in terms for name in epoch))
    lines = {"total": list(losses)} if len(names) != 1 else {}
    lines |= {name: [as_float(epoch.get(name)) for epoch in terms] for name in names}
    weights = {}
    if len(configured) == len(names):
        weights = {n: t.weight for n, t in zip(names, configured, strict=True) if t.weight != 1}
    drawn = [loss_figure(lines, rounds, weights)]
    if known := [(number, epoch) for number, epoch in zip(rounds, gradients) if epoch]:
        names = list(dict.fromkeys(name for _, epoch in known for name in epoch))
        pulls = {name: [as_float(epoch.get(name)) for _, epoch in known] for name in names}
        drawn.append(pull_figure(pulls, [number for number, _ in known]))
    return drawn


@draw.style()
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
    figure, grid = draw.panels(5.6, height, rows, columns)
    starts, label = _epochs(rounds)
    for axes, name in zip(grid, names):
        values = np.asarray(terms[name], dtype=float)
        for start in starts:
            axes.axvline(start + 0.5, color=draw.GREY, lw=0.9, ls=":")
        color = draw.INK if name == "total" else draw.STUDENT
        for start, end in pairwise([0, *starts, len(rounds)]):
            one: draw.Look = {"marker": "o", "ms": 3} if end - start == 1 else {}
            axes.plot(range(start + 1, end + 1), values[start:end], color=color, lw=1.6, **one)
        known = values[np.isfinite(values)]
        if len(known) and known.min() > 0 and known.max() > 20 * known.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own is a formula
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{name}  {TIMES} {weights[name]:g}" if name in weights else name)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel(label, fontsize=8.5, color=draw.GREY)
    return figure


@draw.style()
def pull_figure(pulls: Mapping[str, Sequence[float]], rounds: Sequence[int]) -> Figure:
    """Share of each term in the sum of the terms' gradient norms, per epoch.

    Args:
        pulls: Name -> norm of the weighted term's gradient on the student, per epoch; NaN where
            a term did not count.
        rounds: Round of each epoch.
    """
    table = np.nan_to_num(np.asarray(list(pulls.values()), dtype=float))
    shares = 100 * table / np.maximum(table.sum(axis=0), 1e-30)
    figure, axes = draw.canvas(5.6, 2.6)
    colors = [_TERMS[number % len(_TERMS)] for number in range(len(pulls))]
    axes.stackplot(range(1, len(rounds) + 1), shares, labels=list(pulls), colors=colors, lw=0)
    starts, label = _epochs(rounds)
    for start in starts:
        axes.axvline(start + 0.5, color=draw.GREY, lw=0.9, ls=":")
    axes.set_ylim(0, 100)
    axes.set_xlim(1, max(len(rounds), 2))
    axes.set_ylabel("share of the pull, %")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _epochs(rounds: Sequence[int]) -> tuple[list[int], str]:
    """Epochs after which a new round begins, and the label of the axis."""
    starts = [number for number, (a, b) in enumerate(pairwise(rounds), start=1) if a != b]
    return starts, "epoch" + (" (dotted: a new round begins)" if starts else "")


@draw.style()
def class_figure(
    classes: Sequence[str], scores: Mapping[str, Sequence[float]], held: Sequence[int] = ()
) -> Figure:
    """Accuracy per class in blocks of 25 classes, the student above the ensemble.

    Args:
        classes: Class names, shown where they can be read.
        scores: `student` and maybe `ensemble` -> accuracy per class; NaN without test images.
        held: Clients that hold each class, written below few of them.
    """
    few, named = len(classes) <= 25, len(classes) <= 200
    across = min(25 if named else 100, len(classes))
    blocks = [range(i, min(i + across, len(classes))) for i in range(0, len(classes), across)]
    tall = 0.3 * len(scores) + (0.8 if named else 0.1)
    figure, grid = draw.panels(11.0, 0.4 + tall * len(blocks), len(blocks), 1)
    below = [f"\n{count} clients" for count in held] if few and held else [""] * len(classes)
    for axes, block in zip(grid, blocks):
        rows = np.full((len(scores), across), np.nan)
        for row, values in enumerate(scores.values()):
            rows[row, : len(block)] = np.asarray(values, dtype=float)[block.start : block.stop]
        names = [short(classes[c], 14) + below[c] for c in block] if named else []
        turn = 0 if few and max(map(len, names), default=0) < 30 // across + 12 else 45
        text = (lambda _row, _column, value: percent(value, 0, "")) if few else None
        shown: draw.Look = {"rows": list(scores), "columns": names, "turn": turn, "fontsize": 7}
        image = draw.heat(axes, rows, draw.SHADES, (0, 1), text=text, **shown)
        if not named:
            axes.set_xticks([])
        for place in range(1, len(scores)):
            axes.axhline(place - 0.5, color="white", lw=1.5)
        for column in range(1, across) if named else ():
            axes.axvline(column - 0.5, color="white", lw=0.8)
    draw.scale(figure, image, grid, share=True, fraction=0.02)
    return figure


@draw.style()
def pairs_figure(
    sides: Mapping[str, NDArray[np.uint8]], fused: Sequence[str], true: Sequence[str | None]
) -> Figure:
    """Some pairs, a row for each modality, and below them what the teachers say.

    Args:
        sides: Modality -> images (n, channels, h, w) of the same samples.
        fused: What the teachers together call each.
        true: What each is; None where that is not known.
    """
    count = len(fused)
    figure, axes = draw.panels(0.88 * count + 0.8, 0.92 * len(sides) + 0.5, len(sides), count)
    for row, (name, images) in enumerate(sides.items()):
        for column, image in enumerate(images):
            place = axes[row * count + column]
            grey = image.shape[0] == 1
            shown = image[0] if grey else image[:3].transpose(1, 2, 0)
            place.imshow(shown, cmap="gray" if grey else None)
            place.set(xticks=[], yticks=[])
            place.grid(visible=False)
            place.spines[:].set_visible(False)
        axes[row * count].set_ylabel(short(name, 12), rotation=0, ha="right", va="center")
    for column, (said, truth) in enumerate(zip(fused, true, strict=True)):
        place = axes[(len(sides) - 1) * count + column]
        wrong = truth is not None and said != truth
        text = f"{short(said, 12)}\nnot {short(str(truth), 10)}" if wrong else short(said, 12)
        place.set_xlabel(text, color=draw.PSEUDO if wrong else draw.INK)
    return figure


@draw.style()
def partition_figure(
    counts: ArrayLike,
    classes: Sequence[str],
    *,
    title: str = "",
    clients: Sequence[int] | None = None,
) -> Figure:
    """Images per client and class as shades, with their numbers where there is room for them.

    Args:
        counts: (clients, C), as `FederatedData.class_counts` gives them.
        classes: Class names, C of them.
        title: Line above the figure.
        clients: Their numbers; default: from 0.
    """
    table = np.asarray(counts)
    if table.ndim != 2 or table.shape[1] != len(classes):
        raise ValueError(f"counts must be (clients, {len(classes)} classes), got {table.shape}")
    count, number = table.shape
    roomy = count <= 20 and number <= 40
    width = float(np.clip((0.5 if roomy else 0.16) * count + 2.6, 5.6, 18))
    figure, axes = draw.canvas(width, float(np.clip(0.26 * number + 1.3, 3.5, 15)))
    sizes = table.sum(axis=1)
    whose = range(count) if clients is None else clients
    names = [f"{c}\n{size:,}" if roomy else str(c) for c, size in zip(whose, sizes, strict=True)]
    image = draw.heat(
        axes,
        table.T,
        draw.AMOUNTS,
        (0, 1),
        rows=[short(name, 18) for name in classes],
        columns=names,
        # The square root keeps a handful of images visible beside hundreds.
        norm=PowerNorm(0.5, vmin=0, vmax=max(1, table.max(initial=1))),
        text=(lambda _row, _column, count: f"{count:,.0f}" if count else "·") if roomy else None,
        turn=0,
        fontsize=8 if number <= 40 else 5.5,
    )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("client, and all its images" if roomy else "client")
    draw.scale(figure, image, axes, "images of a class")
    return figure


#: State of a client in a round -> its colour.
PRESENCE = {
    "away": "#8a929a00",
    "there": "#8a929a55",
    "asked, no answer": draw.PSEUDO,
    "asked and answered": draw.STUDENT,
    "an old answer counted": "#9ccbea",
}
_ROWS = 60  # of more clients there is no row for each


@draw.style()
def presence_figure(
    clients: Sequence[int],
    rounds: Sequence[int],
    table: NDArray[np.int8],
    ages: NDArray[np.int_],
) -> Figure:
    """Who was there in which round; of many clients, how many.

    Args:
        clients: Their numbers.
        rounds: Round numbers.
        table: (clients, rounds), each a place in `PRESENCE`.
        ages: (clients, rounds), how many rounds old the answer was that counted; 0 for none.
    """
    table = np.where(ages > 0, len(PRESENCE) - 1, table)
    width = float(np.clip(0.22 * len(rounds) + 1.6, 5.6, 14))
    many = len(clients) > _ROWS
    figure, axes = draw.canvas(width, 3.2 if many else 0.2 * len(clients) + 1.2)
    states = list(PRESENCE.items())[1 : None if ages.any() else -1]
    if many:
        base = np.zeros(len(rounds))
        for state, (label, color) in reversed([*enumerate(states, start=1)]):
            height = (table == state).sum(axis=0)
            axes.bar(rounds, height, 0.8, bottom=base, color=color, label=label, lw=0)
            base = base + height
        axes.set_ylabel("clients")
    else:
        draw.heat(
            axes,
            table,
            ListedColormap([*PRESENCE.values()]),
            (-0.5, len(PRESENCE) - 0.5),
            text=lambda row, column, _: str(ages[row, column] or ""),
            rows=[str(client) for client in clients],
            columns=[str(number) for number in rounds],
            turn=0,
        )
        axes.set_xticks(np.arange(len(rounds) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(clients) + 1) - 0.5, minor=True)
        axes.grid(visible=True, which="minor", color="white", lw=2)
        axes.tick_params(which="minor", length=0)
        axes.set_axisbelow(False)
        axes.set_ylabel("client")
        for label, color in reversed(states):
            axes.bar(0, 0, color=color, label=label)
        axes.set_xlim(-0.5, len(rounds) - 0.5)
    axes.set_xlabel("round")
    figure.legend(loc="outside upper left", ncols=4, handlelength=1, columnspacing=1)
    return figure


@draw.style()
def agreement_figure(names: Sequence[str], table: ArrayLike, apart: int = 0) -> Figure:
    """Shares of samples on which two predictors name the same class.

    Args:
        names: The predictors.
        table: (M, M) in [0, 1].
        apart: How many at the end are no teachers; a line sets them off.
    """
    count = len(names)
    size = float(np.clip(0.34 * count + 1.5, 3.9, 7.0))
    figure, axes = draw.canvas(size + 0.8, size)
    written = (lambda _row, _column, value: f"{100 * value:.0f}") if count <= 14 else None
    image = draw.heat(axes, table, draw.SHADES, (0, 1), text=written, rows=names, columns=names)
    axes.set_aspect("equal")
    figure.set_layout_engine("compressed")  # else names beside square cells are cut off
    step = max(1, -(-count // 30))
    marks = [*range(0, count - apart, step), *range(count - apart, count)]
    small = 8 if count <= 16 else 6.5
    axes.set_yticks(marks, [names[i] for i in marks], fontsize=small)
    turn = 90 if count > 6 else 0
    axes.set_xticks(marks, [names[i] for i in marks], rotation=turn, fontsize=small)
    if apart and count > apart:
        for rule in (axes.axhline, axes.axvline):
            rule(count - apart - 0.5, color="white", lw=2.5)
    draw.scale(figure, image, axes, share=True, fraction=0.045)
    return figure


@draw.style()
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
    figure, grid = draw.panels(11.0, 3.5, 1, 3)
    difference = student - teachers
    widest = max(0.1, float(np.nanmax(np.abs(difference), initial=0.0)))
    shown = [short(name, 10) for name in names] if len(names) <= 24 else []
    for axes, (title, edges, colors, limit) in zip(
        grid,
        (
            ("student", student, draw.SIGNED, 1.0),
            ("teachers, fused", teachers, draw.SIGNED, 1.0),
            ("student \N{MINUS SIGN} teachers", difference, draw.DIFFERENCES, widest),
        ),
    ):
        turn = 90 if max(map(len, shown), default=0) > 2 else 0
        limits = (-limit, limit)
        image = draw.heat(
            axes, edges, colors, limits, rows=shown, columns=shown, turn=turn, fontsize=7
        )
        axes.set_aspect("equal")
        axes.set_title(title)
        if blocks:
            _mark_blocks(axes, blocks)
        elif not shown:
            axes.set_xticks([])
            axes.set_yticks([])
        draw.scale(figure, image, axes, fraction=0.046)
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


@draw.style()
def calibration_figure(sets: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Reliability diagrams: accuracy over confidence, with how many samples fall in each bin.

    Args:
        sets: Name -> `confidence`, `accuracy`, `counts` per bin and `ece`.
    """
    columns = max(1, len(sets))
    figure, grid = draw.panels(*_SIZE, 2, columns, height_ratios=(4, 1))
    for place, (name, bins) in enumerate(sets.items()):
        top, below = grid[place], grid[columns + place]
        right, sure, counts = (
            np.asarray(bins[key], dtype=float) for key in ("accuracy", "confidence", "counts")
        )
        width = 1 / len(counts)
        left = np.arange(len(counts)) * width
        drawn: draw.Look = {
            "width": width * 0.92,
            "align": "edge",
            "color": WHO.get(name.split(",")[0], draw.TEACHER),
        }
        top.bar(left, np.nan_to_num(right), alpha=0.3, **drawn)
        top.plot([0, 1], [0, 1], color=draw.GREY, ls="--", lw=1)
        known = counts > 0
        top.plot(sure[known], right[known], color=drawn["color"], marker="o", ms=3.5, lw=1.4)
        top.set_title(f"{name}\nECE {100 * float(bins['ece']):.1f} %")
        top.set_ylim(0, 1)
        top.set_xticks([0, 0.5, 1], [])
        below.bar(left, counts / max(counts.sum(), 1), **drawn)
        below.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        below.yaxis.set_major_locator(MaxNLocator(2))
        below.set_xlabel("confidence")
        for axes in (top, below):
            axes.set_xlim(0, 1)
            draw.percents(axes)
    grid[0].set_ylabel("accuracy")
    grid[columns].set_ylabel("samples")
    return figure


@draw.style()
def stacked_figure(
    rounds: Sequence[int],
    groups: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    *,
    bytes: bool = True,
) -> Figure:
    """What phases take per round, one upon the other.

    Args:
        rounds: Round numbers.
        groups: Title -> phase -> amount per round above the line, and maybe below it. Each group
            has a scale of its own.
        bytes: Amounts are bytes.
    """
    groups = {title: phases for title, phases in groups.items() if phases}
    figure, grid = draw.panels(*_SIZE, 1, len(groups))
    for axes, (title, phases) in zip(grid, groups.items()):
        largest = np.sum(list(phases.values()), axis=0).max() if bytes else 1.0
        unit, factor = byte_unit(largest)
        for place, sign in enumerate((1, -1)):
            base = np.zeros(len(rounds))
            for phase, ways in phases.items():
                if place < len(ways):
                    height = sign * np.asarray(ways[place], dtype=float) / factor
                    look: draw.Look = {
                        "color": PHASES.get(phase, draw.TEACHER),
                        "edgecolor": "white",
                    }
                    label = "" if place else phase
                    axes.bar(rounds, height, 0.7, bottom=base, label=label, lw=0.5, **look)
                    base = base + height
        axes.axhline(0, color=draw.INK, lw=0.9)
        axes.set_title(f"{title}, {unit}" if bytes else title)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_xlabel("round")
        axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
    figure.legend(loc="outside upper left", ncols=4, handlelength=1, columnspacing=1)
    return figure


@draw.style()
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
    unit, factor = byte_unit(max([*sent, 1.0]))
    across = np.asarray(sent, dtype=float) / factor
    line = draw.Line(
        "", across.tolist(), [accuracy], {"color": draw.STUDENT, "marker": "o", "ms": 5, "lw": 2}
    )
    figure = draw.curves([line], f"knowledge sent by all clients so far, {unit}", size=_SIZE)
    (axes,) = figure.axes
    step = max(1, -(-len(rounds) // 10))
    for x, y, number in list(zip(across, accuracy, rounds))[::step]:
        if np.isfinite(y):
            draw.note(axes, str(number), (x, y), (0, 6), ha="center", va="baseline")
    widest = max(float(across.max()), (transfer or 0) / factor)
    if transfer:
        place = transfer / factor
        axes.axvline(place, color=draw.PSEUDO, ls="--", lw=1.3)
        side: draw.Look = {"ha": "right" if place > 0.5 * widest else "left", "va": "baseline"}
        above: draw.Look = {"xycoords": ("data", "axes fraction"), "color": draw.PSEUDO}
        draw.note(axes, "transfer set, once to every client", (place, 1.02), **above, **side)
    axes.set_xlim(0, widest * 1.08)
    low, high = axes.get_ylim()
    spare = max(0.0, 0.1 - (high - low)) / 2  # a point more or less must not look like a cliff
    axes.set_ylim(max(-0.01, low - spare), min(1.02, high + spare + 0.15 * (high - low)))
    return figure
