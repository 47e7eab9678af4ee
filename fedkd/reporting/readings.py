"""What a figure shows, in words and numbers: for the pointer, the keyboard and screen readers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from fedkd.io.extras import extra

with extra("report", "fedkd.reporting"):
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import PathCollection, PolyCollection
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import FixedFormatter, PercentFormatter

_POINTS, _CELLS = 4000, 4000  # of a figure with more, the rest has no values on the page
_TOLD = 5  # series that a description names one by one

_named: WeakKeyDictionary[Artist, tuple[str, str]] = WeakKeyDictionary()
_tables: WeakKeyDictionary[AxesImage, tuple[Sequence[str], Sequence[str], Sequence[Sequence[str]]]]
_tables = WeakKeyDictionary()


def name(artist: Artist, series: str, who: str = "") -> None:
    """Say which series something drawn belongs to, and who it is, where its label does not."""
    _named[artist] = series, who


def table(
    image: AxesImage, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[str]]
) -> None:
    """Say what the cells of a heat map hold."""
    if len(rows) * len(columns) <= _CELLS:
        rows, columns = ([name.split("\n")[0] for name in names] for names in (rows, columns))
        _tables[image] = rows, columns, cells


@dataclass
class Series:
    """Values that belong together, with their places in the drawing; `minor`: one of many."""

    key: int
    label: str
    places: list[tuple[float, float]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    minor: bool = False


@dataclass
class Reading:
    """What a figure shows.

    Attributes:
        series: Lines and bars.
        grids: Heat maps: place in the drawing, rows, columns, texts of cells.
        artists: Drawn thing -> key of its series, also of entries in a legend (True).
    """

    series: list[Series] = field(default_factory=list)
    grids: list[dict[str, Any]] = field(default_factory=list)
    artists: list[tuple[Artist, int, bool]] = field(default_factory=list)

    def values(self) -> str:
        """As JSON for the page's script; "" if there is nothing to be read."""
        lines = [
            {"k": s.key, "n": s.label, "p": s.places, "t": s.texts} for s in self.series if s.texts
        ]
        if not lines and not self.grids:
            return ""
        whole = {"series": lines, "grids": self.grids}
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":"))

    def finding(self) -> str:
        """The figure in a sentence: where its series begin and end, or its extremes."""
        parts = []
        firsts = {s.label: s for s in reversed(self.series) if s.texts and s.label}
        told = sorted(reversed(firsts.values()), key=lambda series: series.minor)
        for series in told[:_TOLD]:
            first, last = series.texts[0], series.texts[-1]
            ends = last if first == last else f"from {first} to {last}"
            parts.append(f"{series.label}: {ends}")
        if len(told) > _TOLD:
            parts.append(f"and {len(told) - _TOLD} more")
        for grid in self.grids:
            cells = [
                (_number(text), f"{row}, {column}: {text}")
                for row, line in zip(grid["rows"], grid["t"])
                for column, text in zip(grid["columns"], line)
            ]
            known = [(value, text) for value, text in cells if value is not None]
            if known:
                parts.append(f"least {min(known)[1]}; most {max(known)[1]}")
        return ". ".join(parts)


def read(figure: Figure) -> Reading:
    """Read a figure that has been drawn, so that all is in its place."""
    found, count = Reading(), 0
    keys: dict[str, int] = {}
    for axes in figure.axes:
        for artist, label, who in _labelled(axes):
            key = keys.setdefault(label, len(keys)) if label else -1
            if key >= 0:
                found.artists.append((artist, key, False))
            series = _series(
                figure,
                axes,
                artist,
                Series(key, who or label or axes.get_title("left"), minor=bool(who)),
            )
            if series is not None and count + len(series.texts) <= _POINTS:
                count += len(series.texts)
                found.series.append(series)
        for image in axes.images:
            if image in _tables:
                found.grids.append(_grid(figure, axes, image))
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    for legend in filter(None, legends):
        for handle, entry in zip(legend.legend_handles, legend.get_texts()):
            if (own := keys.get(entry.get_text())) is not None:
                found.artists += [(entry, own, True)]
                found.artists += [(handle, own, True)] if handle is not None else []
    return found


def _labelled(axes: Axes) -> Iterator[tuple[Artist, str, str]]:
    """Lines, bands and bars of a figure's part, with the series that each is of and its name."""
    bars = {patch: box for box in axes.containers if isinstance(box, BarContainer) for patch in box}
    marked = (PolyCollection, PathCollection)
    bands = [part for part in axes.collections if isinstance(part, marked)]
    for artist in (*axes.lines, *bands, *bars):
        own = str(bars.get(artist, artist).get_label())
        label, who = _named.get(artist, (own, ""))
        yield artist, "" if label.startswith("_") else label, who


def _series(figure: Figure, axes: Axes, artist: Any, series: Series) -> Series | None:
    """With the values of a line or a bar; None of what has none."""

    def add(place: Any, text: str) -> None:
        series.places.append(_place(figure, place))
        series.texts.append(text)

    if hasattr(artist, "get_xydata"):
        data = np.asarray(artist.get_xydata(), dtype=float)
        moved = artist.get_transform()
        if moved != axes.transData:  # a level through the whole figure
            if artist.get_label().startswith("_") or len(data) < 2:
                return None
            lies = data[0, 1] == data[-1, 1]
            axis, value = (axes.yaxis, data[0, 1]) if lies else (axes.xaxis, data[0, 0])
            add(moved.transform(data).mean(axis=0), _tell(axis, float(value)))
            return series
        if series.key < 0 and artist.get_linestyle() in ("--", ":"):
            return None  # a guide
        for x, y in data[np.isfinite(data).all(axis=1)]:
            across, up = _named_axis(axes.xaxis, x), _tell(axes.yaxis, y)
            upright = isinstance(axes.yaxis.get_major_formatter(), FixedFormatter)
            text = f"{up} · {_tell(axes.xaxis, x)}" if upright else f"{across} · {up}"
            add(axes.transData.transform((x, y)), text)
        return series
    if not hasattr(artist, "get_height"):
        return None
    flat = _is_flat(axes, artist)
    size = artist.get_width() if flat else artist.get_height()
    if not np.isfinite(size) or size == 0:
        return None
    x, y = artist.get_x() + artist.get_width() / 2, artist.get_y() + artist.get_height() / 2
    along = _named_axis(axes.yaxis, y) if flat else _named_axis(axes.xaxis, x)
    value = _tell(axes.xaxis if flat else axes.yaxis, size)
    add(axes.transData.transform((x, y)), f"{along} · {value}")
    return series


def _is_flat(axes: Axes, patch: Any) -> bool:
    box = next((b for b in axes.containers if isinstance(b, BarContainer) and patch in b), None)
    return box is not None and box.orientation == "horizontal"


def _place(figure: Figure, pixels: Any) -> tuple[float, float]:
    """Pixels from below as points from above, as an SVG counts."""
    scale = 72 / figure.dpi
    height = 72 * figure.get_figheight()
    return round(scale * float(pixels[0]), 1), round(height - scale * float(pixels[1]), 1)


def _named_axis(axis: Axis, value: float) -> str:
    title = axis.get_label_text().split(",")[0].split(" (")[0].strip()
    shown = _tell(axis, value)
    if isinstance(axis.get_major_formatter(), FixedFormatter) or not title:
        return shown
    return f"{title} {shown}" if len(title) <= 12 else f"{shown} {title}"


def _tell(axis: Axis, value: float) -> str:
    written = axis.get_major_formatter()
    if isinstance(written, PercentFormatter):
        return f"{100 * value / written.xmax:.1f} %"
    if isinstance(written, FixedFormatter):
        places = [float(place) for place in axis.get_majorticklocs()]
        near = min(range(len(places)), key=lambda i: abs(places[i] - value), default=None)
        if near is not None and near < len(written.seq):
            return str(written.seq[near]).replace("\n", " ")
    return f"{value:.4g}"


def _grid(figure: Figure, axes: Axes, image: AxesImage) -> dict[str, Any]:
    rows, columns, cells = _tables[image]
    low = _place(figure, axes.transData.transform((-0.5, len(rows) - 0.5)))
    high = _place(figure, axes.transData.transform((len(columns) - 0.5, -0.5)))
    box = [min(low[0], high[0]), min(low[1], high[1]), max(low[0], high[0]), max(low[1], high[1])]
    return {"box": box, "rows": list(rows), "columns": list(columns), "t": cells}


def _number(text: str) -> float | None:
    plain = text.replace("\N{MINUS SIGN}", "-").replace(",", "").strip("() ·").split(" ")[0]
    try:
        return float(plain.rstrip("%"))
    except ValueError:
        return None
