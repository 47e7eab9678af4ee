"""A run as one HTML page that needs nothing else: no network, no scripts, no other files.

Works for a run that has finished, is under way or has failed: what is not there is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jinja2

from fedkd.knowledge.store import write_atomically
from fedkd.reporting import figures
from fedkd.reporting.cards import (
    Card,
    accuracy_card,
    calibration_card,
    classes_card,
    cost_card,
    losses_card,
    partition_card,
    pulls_card,
    relation_cards,
    time_card,
    traffic_card,
)
from fedkd.reporting.format import bar, date, human_bytes, or_dash, percent
from fedkd.reporting.header import headline, sentence, state, teachers, tiles
from fedkd.reporting.run_record import Found
from fedkd.reporting.tables import privacy, traffic_tables
from fedkd.reporting.template import PAGE
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import Warned

__all__ = ["human_bytes", "percent", "render", "write_report"]

_MANY = 16  # longer tables are folded up
_REFUSED_SHOWN = 300


def write_report(run: RunDirectory) -> Path:
    """Write `report.html` into the run's folder and return its path.

    The same run gives the same bytes. Parts that need the images are left out, and said to be,
    where the images cannot be loaded.
    """
    page = render(run)
    path = run.path / "report.html"
    write_atomically(path, page.encode("utf-8"))
    return path


def render(run: RunDirectory) -> str:
    """The page as text."""
    found = Found.read(run)
    with figures.style():
        agree, *graphs = relation_cards(found)
        learning = [losses_card(found), pulls_card(found), calibration_card(found)]
        sections: list[tuple[str, str, Sequence[Card | None]]] = [
            ("accuracy", "Accuracy", [accuracy_card(found), classes_card(found)]),
            ("learning", "What the student learnt from", learning),
            ("clients", "Clients and their teachers", [partition_card(found), agree]),
            ("relations", "What relations the student has taken over", graphs),
            ("costs", "Bytes and time", [traffic_card(found), cost_card(found), time_card(found)]),
        ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "bytes": human_bytes,
        "bar": bar,
        "known": or_dash,
    }
    warnings = dict.fromkeys(event.text for event in run.events(Warned))
    return environment.from_string(PAGE).render(
        experiment=run.experiment,
        identity=run.identity,
        date=date(run.path),
        state=state(found),
        sentence=sentence(found),
        tiles=tiles(found),
        headline=headline(found),
        teachers=teachers(found),
        many=_MANY,
        sections=[
            (key, title, _pair(cards, more=key == "costs" and bool(found.messages)))
            for key, title, cards in sections
        ],
        privacy=privacy(found),
        traffic=traffic_tables(found),
        refused=found.refused[:_REFUSED_SHOWN],
        refused_more=max(0, len(found.refused) - _REFUSED_SHOWN),
        warnings=list(warnings),
        asked=bool(found.messages),
        data_problem=found.data_problem,
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        versions=run.read_json("versions.json") or {},
        hash=found.last.hash if found.last else None,
    )


def _pair(cards: Sequence[Card | None], *, more: bool) -> list[Card]:
    """The cards there are; one that would stand beside a hole is spread over the width.

    Args:
        cards: None stands for one that this run has no numbers for.
        more: A card of half the width follows in the page itself.
    """
    there = [card for card in cards if card is not None]
    halves = [number for number, card in enumerate(there) if not card.wide]
    if halves and (len(halves) + more) % 2:
        there[halves[-1]] = replace(there[halves[-1]], lone=True)
    return there
