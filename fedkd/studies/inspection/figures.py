"""The figures of what a student has taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from fedkd.reporting import drawing as draw
from fedkd.reporting.format import as_float, known, number, short

Facts = Mapping[str, Any]

INDEPENDENT = draw.TEACHER
COLORS = {"teacher": draw.ENSEMBLE, "alone": INDEPENDENT}


def color_of(who: str, methods: Sequence[str]) -> str:
    """Of teacher, independent student, or a method's."""
    if who in COLORS:
        return COLORS[who]
    others = [color for color in draw.COLORS if color not in COLORS.values()]
    return others[list(methods).index(who) % len(others)]


@draw.style()
def bars_figure(properties: Facts, methods: Sequence[str], names: Mapping[str, str]) -> Figure:
    """Teacher, distilled and independent student side by side, a row for each property.

    A line over the independent student's bar reaches as far as another seed has moved it.
    """
    who = ["teacher", *methods, "alone"]
    thick = 0.8 / len(who)
    figure, axes = draw.canvas(9.0, 0.9 + len(properties) * (0.3 + 0.13 * len(who)))
    low = 0.0
    for row, about in enumerate(properties.values()):
        rows = about["methods"]
        any_row = next(iter(rows.values()))
        values = {"teacher": any_row["teacher"], "alone": any_row["alone"]}
        values |= {method: rows[method]["student"] for method in methods if method in rows}
        for place, each in enumerate(who):
            value = as_float(values.get(each))
            if not known(value):
                continue
            at = row + (place - (len(who) - 1) / 2) * thick
            color = color_of(each, methods)
            axes.barh(at, value, 0.86 * thick, color=color, label="" if row else names[each])
            low = min(low, value)
            end = max(value, 0.0)
            if each == "alone":
                reach = any_row["spread"] if known(any_row["spread"]) else 0.0
                axes.plot([value - reach, value + reach], [at, at], color=draw.INK, lw=1.4)
                end, low = max(value + reach, 0.0), min(low, value - reach)
            draw.note(axes, number(value, ".2f"), (end, at), (4, 0))
    titles = [about["title"] for about in properties.values()]
    axes.set_yticks(range(len(titles)), titles, color=draw.INK)
    axes.set_ylim(len(titles) - 0.45, -0.55)
    axes.set_xlim(1.12 * low, 1.08)
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper left", ncols=6)
    return figure


@draw.style()
def methods_heat(properties: Facts, methods: Sequence[str]) -> Figure:
    """Methods and properties: distilled less independent; in brackets where a seed does as much."""
    table = [
        [100 * about["methods"].get(method, {}).get("difference", np.nan)
         for about in properties.values()] for method in methods
    ]  # fmt: skip
    counted = [
        [about["methods"].get(method, {}).get("verdict") for about in properties.values()]
        for method in methods
    ]
    return _heat(table, counted, methods, [about["title"] for about in properties.values()])


@draw.style()
def teachers_heat(by_teacher: Facts, titles: Mapping[str, str]) -> Figure:
    """The same of each teacher of an ensemble."""
    columns = list(dict.fromkeys(name for row in by_teacher.values() for name in row))

    def gap(row: Facts, name: str) -> float:
        each = row.get(name)
        return np.nan if each is None else 100 * (each["student"] - each["alone"])

    table = [[gap(row, name) for name in columns] for row in by_teacher.values()]
    counted = [
        [row.get(name, {}).get("verdict") for name in columns] for row in by_teacher.values()
    ]
    return _heat(table, counted, list(by_teacher), [titles[name] for name in columns])


def _heat(
    table: Sequence[Sequence[float]],
    verdicts: Sequence[Sequence[str | None]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> Figure:
    figure, axes = draw.canvas(10.0, 1.7 + 0.28 * len(rows))
    values = np.asarray(table, dtype=float)
    sizes = np.abs(values[np.isfinite(values)])  # one column alone must not make all others pale
    limit = max(float(np.quantile(sizes, 0.9)) if len(sizes) else 0.0, 1e-9)

    def text(row: int, column: int, value: float) -> str:
        if not np.isfinite(value):
            return ""
        shown = number(value, "+.1f")
        return f"({shown})" if verdicts[row][column] == "not taken over" else shown

    image = draw.heat(
        axes,
        values,
        draw.SIGNED.reversed(),
        (-limit, limit),
        rows=[short(name, 24) for name in rows],
        columns=[short(name, 30) for name in columns],
        text=text,
        turn=25,
    )
    draw.scale(figure, image, axes, "hundredths")
    return figure


@draw.style()
def maps_figure(
    images: Tensor, rows: Sequence[tuple[str, Tensor]], titles: Sequence[str]
) -> Figure:
    """Pictures, and below each the class maps of several networks over it.

    Args:
        images: uint8 (K, channels, h, w).
        rows: Name and maps (K, h, w) of each network.
        titles: One for each picture.
    """
    count = len(images)
    figure, grid = draw.panels(10.0, 10.0 / count * (1 + len(rows)) + 0.3, 1 + len(rows), count)
    size = images.shape[-2:]
    for column in range(count):
        pixels = images[column].permute(1, 2, 0).numpy()
        grey = pixels.mean(axis=2)
        axes = grid[column]
        axes.imshow(pixels if pixels.shape[2] == 3 else grey, cmap="gray", vmin=0, vmax=255)
        axes.set_title(short(titles[column], 14), loc="center")
        for row, (_, maps) in enumerate(rows, start=1):
            axes = grid[row * count + column]
            own = functional.interpolate(maps[column][None, None], size, mode="bilinear")[0, 0]
            top = float(own.max())
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
            axes.imshow(own.numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=top or 1.0)
    for axes in grid:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    for row, name in enumerate(["image", *(name for name, _ in rows)]):
        grid[row * count].set_ylabel(name, fontsize=8.5, color=draw.INK)
    return figure


@draw.style()
def lines_figure(
    curves: Mapping[str, Sequence[float]],
    ticks: Sequence[str],
    methods: Sequence[str],
    names: Mapping[str, str],
    xlabel: str,
    ylabel: str,
) -> Figure:
    """A line for each network over steps that have names."""
    figure, axes = draw.canvas(5.4, 3.0)
    for place, (who, values) in enumerate(curves.items()):
        marker = draw.MARKERS[place % 11]
        look: draw.Look = {"color": color_of(who, methods), "marker": marker, "ms": 4}
        axes.plot(range(len(ticks)), values, label=names[who], lw=1.6, **look)
    axes.set_xticks(range(len(ticks)), ticks)
    draw.percents(axes)
    axes.set_ylim(-0.02, 1.03)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@draw.style()
def bias_figure(groups: Facts, method: str) -> Figure:
    """For each class: teacher less its mean, and distilled less independent student."""
    rows = groups["accuracies"]
    ours = np.asarray(rows[method], dtype=float) - np.asarray(rows["alone"], dtype=float)
    theirs = np.asarray(rows["teacher"], dtype=float)
    theirs = theirs - np.nanmean(theirs)
    order = np.argsort(theirs)
    if len(order) > 24:
        order = np.concatenate([order[:12], order[-12:]])
    figure, axes = draw.canvas(9.0, 2.7)
    at = np.arange(len(order))
    axes.bar(at - 0.2, 100 * theirs[order], 0.38, color=draw.ENSEMBLE,
             label="teacher, less its mean")  # fmt: skip
    axes.bar(at + 0.2, 100 * ours[order], 0.38, color=draw.STUDENT,
             label="distilled less independent student")  # fmt: skip
    axes.axhline(0, color=draw.INK, lw=0.8)
    names = [short(groups["names"][place], 12) for place in order]
    long = max(map(len, names)) > 4 and len(names) > 12
    axes.set_xticks(at, names, rotation=90 if long else 0)
    axes.set_ylabel("points of accuracy")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@draw.style()
def clients_figure(clients: Sequence[Facts]) -> Figure:
    """What the distilled student gained on each client's classes, and what another seed does."""
    rows = [
        draw.Dot(
            f"client {row['client']}, {100 * row['share']:.0f} % of the fused labels",
            100 * row["gain"],
            (-100 * row["spread"], 100 * row["spread"]),
            color=draw.STUDENT,
        )
        for row in sorted(clients, key=lambda row: -row["share"])
    ]
    label = "points of accuracy over the independent student, on the client's classes"
    return draw.dots(rows, label, zero=0.0)
