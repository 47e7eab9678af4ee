"""What all figures share: looks, canvas, lines with bands, heat maps, inline SVG.

Plain numbers in, a matplotlib `Figure` out; each subject has its figures in a module of its own.
No pyplot, so nothing global is left behind; equal numbers give equal bytes. Colours are Okabe and
Ito's, which people with colour-blindness can tell apart, and every line also differs in style.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fedkd.io.extras import extra
from fedkd.reporting.format import short

with extra("report", "fedkd.reporting"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import PercentFormatter

STUDENT, ENSEMBLE, ORACLE, CEILING = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
PSEUDO, TEACHER, INK, GREY, LINE = "#D55E00", "#8a929a", "#24292f", "#6a737d", "#e4e7eb"
COLORS = (STUDENT, PSEUDO, ORACLE, CEILING, ENSEMBLE, "#56B4E9", INK)
MARKERS = "osD^vP*X<>hd"
# Dark blue to pale yellow through grey-blue: order survives in grey and for every eye.
SHADES = LinearSegmentedColormap.from_list("shades", ("#1a3a66", "#5f93b5", "#c9dccf", "#fcf3b8"))

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


Look = dict[str, Any]
"""Colour, dashes, marker, … as matplotlib calls them."""


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures; decorates the functions that make them."""
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts
        warnings.filterwarnings("ignore", message="All-NaN|Mean of empty")  # nothing is drawn there
        yield


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element: same bytes for the same figure, no ids but its own.

    Args:
        figure: The figure.
        name: Unique on the page; keeps the references of two figures apart.
    """
    buffer = io.StringIO()
    with style(), rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # matplotlib numbers groups alike in every figure
    text = re.sub(r' id="image[^"]*"', "", text)  # equal images have equal ones; nothing uses them
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text, count=2)  # HTML needs none
    sized = f'<svg style="--inches: {figure.get_figwidth():g}"'  # the page's style scales it
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', sized, text, count=1)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def panels(
    width: float, height: float, rows: int, columns: int, **ratios: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure and the axes of a grid, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, gridspec_kw=ratios or None, squeeze=False)
    return figure, list(grid.ravel())


def percents(axes: Axes, way: str = "y", decimals: int | None = 0) -> None:
    """Write an axis of shares in percent."""
    axis = axes.yaxis if way == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(1, decimals=decimals))


def note(axes: Axes, text: str, place: tuple[Any, Any], shift: tuple[float, float] = (0, 0),
         **look: Any) -> None:  # fmt: skip
    """Small grey text, so many points beside a place in the data."""
    look = {"fontsize": 7.5, "color": GREY, "va": "center", **look}
    axes.annotate(text, place, shift, textcoords="offset points", **look)


@dataclass(frozen=True)
class Line:
    """The mean of several runs, in the band from their lowest to their highest.

    Attributes:
        label: In the legend; "" leaves it out.
        x: Places, as many as the longest run has values.
        runs: Values of each run; the line is as long as the shortest.
        look: Its own.
        band: How opaque the band is; 0 draws none.
    """

    label: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]]
    look: Look
    band: float = 0.12

    def draw(self, axes: Axes) -> None:
        """Draw it."""
        length = min(map(len, self.runs), default=0)
        if not length:
            return
        table = np.asarray([run[:length] for run in self.runs], dtype=float)
        x = self.x[:length]
        if len(table) > 1 and self.band:
            color = self.look["color"]
            ends = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
            axes.fill_between(x, *ends, color=color, alpha=self.band, lw=0)
        label = short(self.label, 26) if self.label else None
        axes.plot(x, np.nanmean(table, axis=0), label=label, **{"ms": 4.5, "lw": 1.6, **self.look})


@style()
def curves(
    lines: Iterable[Line],
    xlabel: str,
    *,
    levels: Iterable[tuple[float, Look]] = (),
    size: tuple[float, float] = (11.0, 4.6),
) -> Figure:
    """Accuracies over whatever they depend on, with a legend beside them."""
    figure, axes = canvas(*size)
    for line in lines:
        line.draw(axes)
    for value, look in levels:
        axes.axhline(value, **{"alpha": 0.7, **look})
    percents(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("test accuracy")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper")
    return figure


@dataclass(frozen=True)
class Dot:
    """A row of `dots`.

    Attributes:
        name: At the left.
        value: The dot.
        ends: Of an interval around it.
        points: What it is the mean of.
        ring: Another value.
        color: Of all but the ring.
    """

    name: str
    value: float
    ends: Sequence[float] = ()
    points: Sequence[float] = ()
    ring: float | None = None
    color: str = STUDENT


@style()
def dots(
    rows: Sequence[Dot], xlabel: str, *, label: str = "", ring: str = "", zero: float | None = None
) -> Figure:
    """Values in their intervals, one below the other.

    Args:
        rows: From the top.
        xlabel: What the values are.
        label: Name of the dots in the legend.
        ring: Name of the rings.
        zero: Where a line is drawn through all rows.
    """
    figure, axes = canvas(9.0, 1.2 + 0.28 * len(rows))
    if zero is not None:
        axes.axvline(zero, color=INK, lw=0.8, ls=":")
    rings: Look = {"ls": "", "marker": "D", "ms": 5.5, "mfc": "none", "color": ENSEMBLE}
    for place, row in enumerate(reversed(rows)):
        line: Look = {"color": row.color, "lw": 4, "alpha": 0.35}
        axes.plot(row.ends, [place] * len(row.ends), **line)
        axes.plot(row.points, [place] * len(row.points), ".", color=row.color, ms=4.5)
        axes.plot([row.value], [place], "o", color=row.color, ms=6, label="" if place else label)
        if row.ring is not None:
            axes.plot([row.ring], [place], label="" if place else ring, **rings)
    axes.set_yticks(range(len(rows)), [short(row.name, 40) for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(xlabel)
    if label:
        figure.legend(loc="outside upper left", ncols=6)
    return figure


def heat(
    axes: Axes,
    values: ArrayLike,
    colors: Any,
    limits: tuple[float, float],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    text: Callable[[int, int, float], str] | None = None,
    turn: float | None = None,
    fontsize: float = 8,
    norm: Any = None,
) -> AxesImage:
    """A table of colours; what is not known stays grey.

    Args:
        axes: Where it is drawn.
        values: (rows, columns).
        colors: A colour map.
        limits: Values of its ends.
        rows: Names from the top; of many, every so many are shown.
        columns: Names from the left, likewise.
        text: (row, column, value) -> what is written in the cell.
        turn: Degrees by which names of columns are turned; default: upright if they are long.
        fontsize: Of names.
        norm: Where a value lies between the ends, in place of `limits`.
    """
    table = np.asarray(values, dtype=float)
    norm = norm or Normalize(*limits)
    image = axes.imshow(table, aspect="auto", cmap=colors, norm=norm)
    axes.set_facecolor("#eceef1")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _names(axes.set_yticks, rows, 0, fontsize)
    if turn is None:
        turn = 90 if max(map(len, columns), default=0) > 3 and len(columns) > 6 else 0
    _names(axes.set_xticks, columns, turn, fontsize)
    for (row, column), value in np.ndenumerate(table) if text is not None else ():
        assert text is not None
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = np.isfinite(value) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        color = "white" if dark else INK
        written = text(row, column, value)
        axes.text(column, row, written, ha="center", va="center", fontsize=7.5, color=color)
    return image


def _names(place: Callable[..., Any], names: Sequence[str], turn: float, fontsize: float) -> None:
    marks = range(0, len(names), max(1, -(-len(names) // 40)))
    slanted = {"ha": "right", "rotation_mode": "anchor"} if 0 < turn < 90 else {}
    look = {"rotation": turn, "fontsize": fontsize, **slanted}
    place(marks, [names[mark] for mark in marks], **look)


def scale(figure: Figure, image: AxesImage, axes: Any, label: str = "", *, share: bool = False,
          fraction: float = 0.03) -> None:  # fmt: skip
    """The colours of a heat map, beside it; `share` writes percent."""
    bar = figure.colorbar(image, ax=axes, fraction=fraction, pad=0.02, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    if share:
        percents(bar.ax)
