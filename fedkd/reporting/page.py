"""A page that needs nothing else: no network, no other files, and no script but its own.

A page is sections of cards, and a card figures, a table or text, each with what to see in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from fedkd.io.extras import extra

with extra("report", "fedkd.reporting"):
    import jinja2
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure

from fedkd.knowledge.store import write_atomically
from fedkd.reporting import drawing
from fedkd.reporting.format import bar
from fedkd.reporting.table import Cell, Row, Table, plain, words
from fedkd.reporting.template import PAGE


@dataclass(frozen=True)
class Card:
    """Figures, a table or a text, with what to see in it.

    Attributes:
        title: Heading; "" for the only card of a section.
        caption: What it shows and what to look for, or why there is nothing.
        figures: Drawn one below the other.
        table: Between figures and caption.
        code: A file's text.
        notes: Warnings.
        wide: Takes the whole width.
        fold: Folded up under this line; "" shows it all.
        open: Whether a fold is open at first.
        first: Of the figures' series those that are shown at first; 0 shows all.
        configs: Name -> dotted key -> value: two of them can be compared.
    """

    title: str = ""
    caption: str = ""
    figures: Sequence[Figure] = ()
    table: Table | None = None
    code: str = ""
    notes: Sequence[str] = ()
    wide: bool = True
    fold: str = ""
    open: bool = False
    first: int = 0
    configs: Mapping[str, Mapping[str, Any]] | None = None
    lone: bool = False  # of half the width, without a neighbour: the caption is beside the figure


def half(title: str, caption: str, *figures: Figure) -> Card:
    """A card of half the width."""
    return Card(title, caption, figures, wide=False)


@dataclass(frozen=True)
class Section:
    """Cards under a heading.

    Attributes:
        key: Its anchor.
        title: Heading, and its name in the list of sections.
        cards: None stands for one that there are no numbers for.
    """

    key: str
    title: str
    cards: Sequence[Card | None]

    def laid_out(self) -> Section:
        """The cards there are; one of half the width beside a hole is spread over the width."""
        there = [card for card in self.cards if card is not None]
        halves = [place for place, card in enumerate(there) if not card.wide and not card.fold]
        if halves and sum(not card.wide for card in there) % 2:
            there[halves[-1]] = replace(there[halves[-1]], lone=True)
        return replace(self, cards=there)


@dataclass(frozen=True)
class Tile:
    """A number worth a glance."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on a page.

    Attributes:
        title: Heading.
        sentence: What was done.
        sections: In order; one without cards is left out.
        footer: What the page is about, for whoever finds it.
        state: Badge that the work is complete; with `partial` that it is not.
        partial: Whether it is under way or failed.
        warning: A second badge.
        remarks: Beside the badges: seeds, date.
        headline: The number in large print, and what it is.
        tiles: Further numbers.
        notes: Warnings above the first section.
    """

    title: str
    sentence: str
    sections: Sequence[Section]
    footer: str
    state: str = ""
    partial: bool = False
    warning: str = ""
    remarks: Sequence[str] = ()
    headline: tuple[str, str] | None = None
    tiles: Sequence[Tile] = ()
    notes: Sequence[str] = field(default_factory=tuple)


_FILES = ("config.yaml", "summary.json", "results.json", "results.csv", "rounds.csv",
          "metrics.jsonl", "ledger.jsonl")  # fmt: skip


def config_section(folder: Path, versions: Mapping[str, str] | None, command: str) -> Section:
    """The resolved config of a run or study, what ran it, and how that is done again.

    Args:
        folder: Of the run or study.
        versions: Library -> version.
        command: That takes the config ("run", "privacy sweep").
    """
    code = (folder / "config.yaml").read_text(encoding="utf-8")
    table = plain(words("", ""), (versions or {}).items())
    beside = [Row([Cell(name, link=name)]) for name in _FILES if (folder / name).is_file()]
    cards = [
        again(f"fedkd {command} {folder.name}/config.yaml", f"fedkd report {folder.name}"),
        Card(fold="Resolved config", code=code),
        Card(fold="Versions", table=table),
        Card(fold="Files beside this page", table=Table(words(""), beside)),
    ]
    return Section("config", "Config and versions", cards)


def again(command: str, page: str = "") -> Card | None:
    """The commands that do all of it again, or only write its page again; None if not known."""
    if not command:
        return None
    code = f"{command}\n{page}" if page else command
    what = "The first makes all of it anew, the second only this page." if page else ""
    return Card("", what, code=code)


def progress(results: Mapping[str, Any], so_far: str = "") -> dict[str, Any]:
    """State and notes of a study's page, from its results.

    Args:
        results: What all kinds of studies have.
        so_far: What is there of one that is not finished ("3 of 8 students").
    """
    done = bool(results["finished"])
    notes = [f"{label} failed: {error}" for label, error in results["errors"].items()]
    state = "complete" if done else " · ".join(filter(None, ("not complete", so_far)))
    return {"state": state, "partial": not done, "notes": notes}


def size_tile(tests: int | None, share: float | None, who: str = "one accuracy") -> list[Tile]:
    """How many test images there are, and how far off an accuracy may be by them alone."""
    if not tests or share is None:
        return []
    half = 1.96 * math.sqrt(share * (1 - share) / tests)
    return [Tile("test images", f"{tests:,}", f"{who} ± {100 * half:.1f} points (95 %)")]


def render(page: Page) -> str:
    """The page as HTML; equal pages give equal text. What it shows of others is text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    places = count(1)

    def drawn(figure: Figure) -> tuple[Markup, Markup, str]:
        text, reading = drawing.svg(figure, f"figure{next(places)}")
        return Markup(text), quoted(reading.values()), reading.finding()

    def as_json(value: Any) -> Markup:
        return quoted(json.dumps(value, ensure_ascii=False, separators=(",", ":")))

    environment.filters |= {"bar": bar, "drawn": drawn, "json": as_json}
    sections = [laid for section in page.sections if (laid := section.laid_out()).cards]
    return environment.from_string(PAGE).render(page=page, sections=sections).lstrip()


def quoted(text: str) -> Markup:
    """For an attribute with single quotes: JSON is full of double ones."""
    return Markup(str(escape(text)).replace("&#34;", '"'))


def write(path: Path, page: Page) -> Path:
    """Write the page and return its path."""
    write_atomically(path, render(page).encode("utf-8"))
    return path
