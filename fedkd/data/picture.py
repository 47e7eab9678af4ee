"""A picture of who holds which classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedkd.io.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One dark blue that everybody can tell from white; amounts are areas or shades, never hues.
INK = "#1f4e79"
GREY = "#666666"
PALE = "#c9d3dc"


def partition_picture(
    counts: Tensor | np.ndarray, classes: Sequence[str], *, title: str = ""
) -> Figure:
    """Draw images per client and class: bubbles, or a heat map where bubbles would be crowded.

    Args:
        counts: (clients, C), as `FederatedData.class_counts` gives them.
        classes: Class names, C of them.
        title: Line above the picture.

    Returns:
        A figure of its own (no pyplot state): save it with `figure.savefig(path)`.
    """
    with extra("report", "a picture of a partition"):
        from matplotlib.figure import Figure

    table = np.asarray(counts)
    if table.ndim != 2 or table.shape[1] != len(classes):
        raise ValueError(f"counts must be (clients, {len(classes)} classes), got {table.shape}")
    clients, number = table.shape
    crowded = number > 20 or clients > 40
    width = float(np.clip((0.16 if crowded else 0.5) * clients + 2.6, 5.5, 18))
    height = float(np.clip((0.13 if crowded else 0.36) * number + 1.9, 4.2, 15))
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    share = 0.75 / (height - 1.2)
    sizes: Any
    main: Any
    sizes, main = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (share, 1 - share), "hspace": 0.02}
    )
    _draw_sizes(sizes, table.sum(1))
    if title:
        sizes.set_title(title, loc="left", fontsize=11, parse_math=False)
    if crowded:
        _draw_heat(figure, main, table)
    else:
        _draw_bubbles(main, table)
    _label_axes(main, clients, classes, room=height - 2.0)
    return figure


def _draw_sizes(axes: Axes, sizes: np.ndarray) -> None:
    axes.bar(np.arange(len(sizes)), sizes, width=0.6, color=PALE)
    axes.set_ylabel("images", fontsize=8, color=GREY)
    axes.set_ylim(0, max(1, sizes.max(initial=1)) * 1.35)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    if len(sizes) <= 24:
        for client, size in enumerate(sizes):
            axes.annotate(
                f"{int(size):,}", (client, size), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=7, color=GREY,
            )  # fmt: skip


def _draw_bubbles(axes: Axes, table: np.ndarray) -> None:
    client, label = np.nonzero(table)
    amount = table[client, label]
    # The largest bubble just fills its cell of about 0.36 inch (26 points).
    axes.scatter(client, label, s=(24**2) * amount / max(1, table.max(initial=1)), color=INK, lw=0)
    axes.scatter(client, label, s=1.5, color=INK, lw=0)  # a few images stay visible
    if len(amount):
        axes.annotate(
            f"largest: {int(amount.max()):,} images", (1, 0), (0, -24), ha="right", va="top",
            xycoords="axes fraction", textcoords="offset points", fontsize=7, color=GREY,
        )  # fmt: skip
    axes.set_axisbelow(True)
    axes.grid(color="#e6e6e6", lw=0.7)


def _draw_heat(figure: Figure, axes: Axes, table: np.ndarray) -> None:
    from matplotlib.colors import PowerNorm

    # The square root keeps a handful of images visible beside hundreds.
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, table.max(initial=1)))
    image = axes.imshow(table.T, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.01)
    bar.set_label("images of a class", fontsize=8, color=GREY)
    bar.ax.tick_params(labelsize=7, colors=GREY)


def _label_axes(axes: Axes, clients: int, classes: Sequence[str], *, room: float) -> None:
    axes.set_xlim(-0.6, clients - 0.4)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    step = max(1, -(-clients // 25))
    axes.set_xticks(range(0, clients, step), [str(i) for i in range(0, clients, step)], fontsize=8)
    small = len(classes) * 0.15 > room
    axes.set_yticks(
        range(len(classes)),
        [name if len(name) <= 18 else name[:17] + "…" for name in classes],
        fontsize=5.5 if small else 8,
        parse_math=False,  # a `$` in the name of a class starts no formula
    )
    axes.set_xlabel("client", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
