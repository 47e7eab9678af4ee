"""A short HTML page: a title, a sentence, and cards with a picture or a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from fedkd.knowledge.store import write_atomically
from fedkd.reporting.template import STYLE

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>{{ title }} · fedkd</title>
<style>{{ style }}
thead .n { white-space: normal; }</style>
</head>
<body>
<main>
<header><div><h1>{{ title }}</h1><p class="sentence">{{ sentence }}</p></div></header>
<div class="grid" style="margin-top: 26px">
  {% for card in cards %}
  <section class="card wide">
    <h3>{{ card.title }}</h3>
    {% if card.picture %}
    <div class="figure" role="img" aria-label="{{ card.title }}">{{ card.picture|markup }}</div>
    {% endif %}
    {% if card.header %}
    <div class="scroll"><table>
      <thead><tr>{% for name in card.header %}
        <th{% if card.numbers and not loop.first %} class="n"{% endif %}>{{ name }}</th>
        {%- endfor %}</tr></thead>
      <tbody>{% for row in card.rows %}
      <tr>{% for cell in row %}
        <td{% if card.numbers and not loop.first %} class="n"{% endif %}>{{ cell }}</td>
        {%- endfor %}</tr>
      {% endfor %}</tbody>
    </table></div>
    {% endif %}
    <p class="caption">{{ card.caption }}</p>
  </section>
  {% endfor %}
</div>
<footer>{{ footer }}</footer>
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Card:
    """A picture or a table, with what to see in it.

    Attributes:
        title: Heading.
        caption: What it shows and what to look for.
        picture: An `<svg>` element, as `plots.svg` makes it.
        header: Names of a table's columns.
        rows: Its cells.
        numbers: All columns but the first are numbers.
    """

    title: str
    caption: str
    picture: str | None = None
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: bool = True


def write(path: Path, *, title: str, sentence: str, cards: Sequence[Card], footer: str) -> Path:
    """Write the page, which needs no other file, and return its path."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["markup"] = Markup
    text = environment.from_string(_PAGE).render(
        title=title, sentence=sentence, cards=cards, footer=footer, style=Markup(STYLE)
    )
    write_atomically(path, text.encode("utf-8"))
    return path
