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
from fedkd.reporting import readings
from fedkd.reporting.format import number, short
from fedkd.reporting.readings import Reading

with extra("report", "fedkd.reporting"):
    from matplotlib import colormaps, rc_context
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import PercentFormatter

STUDENT, ENSEMBLE, ORACLE, CEILING = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
PSEUDO, TEACHER, INK, GREY, LINE = "#D55E00", "#8a929a", "#24292f", "#6a737d", "#e4e7eb"
COLORS = (STUDENT, PSEUDO, ORACLE, CEILING, ENSEMBLE, "#56B4E9", INK)
MARKERS = "osD^vP*X<>hd"
# Dark blue to pale yellow through grey-blue: order survives in grey and for every eye.
SHADES = LinearSegmentedColormap.from_list("shades", ("#1a3a66", "#5f93b5", "#c9dccf", "#fcf3b8"))
_CLEAR = (0.0, 0.45, 0.7, 0.0)


def _from_nothing(*ends: tuple[float, float, float]) -> LinearSegmentedColormap:
    """Colours that begin in the page's own, be it light or dark: a low end and a high one."""
    low, high = ends
    clear = [(0.5 - 1e-6, (*low, 0.0)), (0.5 + 1e-6, (*high, 0.0))]
    return LinearSegmentedColormap.from_list(
        "signed", [(0.0, (*low, 1.0)), *clear, (1.0, (*high, 1.0))]
    )


# Amounts from nothing to blue; signed values from blue (or orange) by nothing to red (or purple).
AMOUNTS = LinearSegmentedColormap.from_list("amounts", [_CLEAR, (0.03, 0.38, 0.66, 1.0)])
SIGNED = _from_nothing((0.13, 0.40, 0.67), (0.70, 0.09, 0.17))
DIFFERENCES = _from_nothing((0.70, 0.35, 0.02), (0.33, 0.15, 0.53))

# Colours that follow the page, light or dark: its style has a variable for each.
_THEME = {
    INK: "ink", GREY: "soft", LINE: "line", "#aab1b9": "edge", STUDENT: "student",
    ENSEMBLE: "ensemble", ORACLE: "oracle", CEILING: "ceiling", PSEUDO: "pseudo",
    TEACHER: "teacher", "#56B4E9": "worst", "#ffffff": "card", "#eceef1": "track",
    "#cfd4da": "pale",
}  # fmt: skip
_PALE, _DARK = "#fefefe", "#23282e"  # on a cell's own colour, and so the same on every page

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, small, in the page's own font
    "text.color": INK,
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


def svg(figure: Figure, name: str) -> tuple[str, Reading]:
    """The figure as an `<svg>` element, and what it shows.

    Same bytes for the same figure, no ids but its own. Its colours are those of the page.

    Args:
        figure: The figure.
        name: Unique on the page; keeps the references of two figures apart.
    """
    with style(), rc_context({"svg.hashsalt": name}):
        figure.draw_without_rendering()
        reading = readings.read(figure)
        for artist, key, entry in reading.artists:
            artist.set_gid(f"series-{key}{'-legend' if entry else ''}")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="series-(\d+)(-legend)?"', _marked, text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # matplotlib numbers groups alike in every figure
    text = re.sub(r' id="image[^"]*"', "", text)  # equal images have equal ones; nothing uses them
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text, count=2)  # HTML needs none
    for color, variable in _THEME.items():
        text = re.sub(rf"(fill|stroke): {color}", rf"\1: var(--{variable})", text, flags=re.I)
    sized = f'<svg style="--inches: {figure.get_figwidth():g}"'  # the page's style scales it
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', sized, text, count=1), reading


def _marked(match: re.Match[str]) -> str:
    return f'<g data-k="{match[1]}"' + (" data-legend" if match[2] else "")


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
        series: What the legend's switch takes it for; default: the label.
        who: What it is called where its values are read; default: the same.
    """

    label: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]]
    look: Look
    band: float = 0.12
    series: str = ""
    who: str = ""

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
            area = axes.fill_between(x, *ends, color=color, alpha=self.band, lw=0)
            readings.name(area, short(self.series or self.label, 26))
        label = short(self.label, 26) if self.label else None
        look = {"ms": 4.5, "lw": 1.6, **self.look}
        (line,) = axes.plot(x, np.nanmean(table, axis=0), label=label, **look)
        if self.series or self.who:
            readings.name(line, short(self.series or self.label, 26), self.who)


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
    low, high = axes.get_ylim()
    if high - low < 0.02:  # a fraction of a point is not to look like a rise
        low, high = axes.set_ylim((low + high) / 2 - 0.01, (low + high) / 2 + 0.01)
    percents(axes, decimals=0 if high - low > 0.05 else None)
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
        (dot,) = axes.plot([row.value], [place], "o", color=row.color, ms=6,
                           label="" if place else label)  # fmt: skip
        readings.name(dot, label)
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
    shades: Colormap = colormaps[colors] if isinstance(colors, str) else colors
    shades = shades.with_extremes(bad=f"{TEACHER}33")
    image = axes.imshow(table, aspect="auto", cmap=shades, norm=norm)
    axes.set_facecolor("none")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _names(axes.set_yticks, rows, 0, fontsize)
    if turn is None:
        turn = 90 if max(map(len, columns), default=0) > 3 and len(columns) > 6 else 0
    _names(axes.set_xticks, columns, turn, fontsize)
    cells = [["" for _ in line] for line in table]
    for (row, column), value in np.ndenumerate(table):
        red, green, blue, alpha = image.cmap(image.norm(value)) if np.isfinite(value) else (0,) * 4
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        color = INK if alpha < 0.7 else _PALE if dark else _DARK
        written = text(row, column, value) if text is not None else ""
        if written:
            axes.text(column, row, written, ha="center", va="center", fontsize=7.5, color=color)
        cells[row][column] = written or (
            number(value, ".3g") if np.isfinite(value) else "not known"
        )
    height, width = table.shape
    readings.table(
        image,
        list(rows) if len(rows) == height else [f"row {n + 1}" for n in range(height)],
        list(columns)[:width] if len(columns) >= width
        else [*columns, *(f"column {n + 1}" for n in range(len(columns), width))],
        cells,
    )  # fmt: skip
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
