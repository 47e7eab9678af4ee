"""The tables of the documentation that registries can fill: `python -m tests.tables` writes them.

A table is known by the heading above it, a column by its title. What a registry knows is filled in
(names, options, counts of parameters, whether labels are needed); what it is, and where it was
published, is for people to write. A name without a row gets one, a row without a name goes.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedkd.data import DATASETS, PARTITIONS, SAMPLERS, SHIFTS
from fedkd.fusion import FUSIONS
from fedkd.knowledge.codecs import CODECS
from fedkd.losses import LOSSES
from fedkd.models import MODELS
from fedkd.models.network import parameter_count
from fedkd.privacy.release import RELEASES
from fedkd.registry import Registry
from fedkd.simulations.baselines import BASELINES
from fedkd.training.properties import PROPERTIES

DOCS = Path(__file__).parents[1] / "docs"
REGISTRIES: dict[str, Registry[Any]] = {
    "Losses": LOSSES,
    "Fusion rules": FUSIONS,
    "Releases": RELEASES,
    "Codecs": CODECS,
    "Baselines": BASELINES,
    "Models": MODELS,
    "Data sets": DATASETS,
    "Partitions": PARTITIONS,
    "Samplers": SAMPLERS,
    "Domains": SHIFTS,
    "Properties": PROPERTIES,
}
# Rows that stand for more than one name.
PATTERNS = ("torchvision/<name>", "timm/<name>", "open_clip/<name>", "hf/<folder>")


def options(registry: Registry[Any], name: str) -> str:
    """`temperature=4.0, standardise=False`, as code; "none" without any."""
    known = registry.options(name).items()
    each = [
        key if p.default is inspect.Parameter.empty else f"{key}={p.default!r}" for key, p in known
    ]
    return f"`{', '.join(each)}`" if each else "none"


def parameters(classes: int, channels: int, size: int) -> Callable[[Registry[Any], str], str]:
    """How many parameters a model has for such images."""

    def count(registry: Registry[Any], name: str) -> str:
        with torch.device("meta"):
            return f"{parameter_count(registry.create(name, classes, channels, size)):,}"

    return count


COLUMNS: dict[str, Callable[[Registry[Any], str], str]] = {
    "options": options,
    "labels": lambda registry, name: "yes" if registry.create(name).needs_targets else "no",
    "parameters 3×32×32, 100": parameters(100, 3, 32),
    "parameters 1×28×28, 10": parameters(10, 1, 28),
}


def cells(row: str) -> list[str]:
    """Of a line of a table."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def table(text: str, section: str) -> tuple[str, list[str], tuple[int, int]] | None:
    """Title line, rows and place of the table of names below a heading, if there is one."""
    found = re.search(rf"^##? {section}\n(?:(?!^#).*\n)*?(\| name \|(?:.*\|\n)+)", text, re.M)
    if found is None:
        return None
    title, _, *lines = found[1].splitlines()
    return title, lines, found.span(1)


def rows(text: str, section: str) -> dict[str, list[str]]:
    """Cells of each row of the table below a heading, by the name in the first cell."""
    found = table(text, section)
    return {row[0].strip("`"): row for row in map(cells, found[1] if found else ())}


def filled(text: str) -> str:
    """A page, each table below a known heading filled from its registry."""
    for section, registry in REGISTRIES.items():
        found = table(text, section)
        if found is None:
            continue
        title, lines, (start, end) = found
        titles, known = cells(title), rows(text, section)
        names = [name for name in known if name in registry.names() or name in PATTERNS]
        lines = [title, "|" + "---|" * len(titles)]
        for name in (*names, *sorted(set(registry.names()) - set(names))):
            row = known.get(name) or [f"`{name}`", registry.summary(name), *titles[2:]]
            if name not in PATTERNS:
                row = [
                    COLUMNS[title](registry, name) if title in COLUMNS else cell
                    for title, cell in zip(titles, row)
                ]
            lines.append(f"| {' | '.join(row)} |")
        text = text[:start] + "\n".join(lines) + "\n" + text[end:]
    return text


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.name}: tables filled")
