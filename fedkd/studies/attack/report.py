"""A study of attacks as numbers, a heat map, tables and a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedkd.attacks import ATTACKS
from fedkd.io.records import read_json
from fedkd.reporting import page
from fedkd.reporting.drawing import INK, SIGNED, canvas, heat, scale, style
from fedkd.reporting.format import as_float, count, number, percent, seeds, short
from fedkd.reporting.page import Card, Page, Section
from fedkd.reporting.table import Row, Table, numbers, plain, words
from fedkd.studies.attack.config import CLEAN, FIRST, AttackConfig, attackers_of
from fedkd.studies.engine import REPORT, Found, Record

_RULE = numbers("clean, %", "worst attack", "worst cost", "mean cost", "worst against the default")
Costs = Mapping[str, float]
"""`accuracy`, `cost`, `class_cost`, `against_default` and `refused` of a rule under an attack."""


def table(study: AttackConfig, found: Found) -> Record:
    """Mean over seeds of every cell, with costs in points of accuracy.

    `rows` maps threat -> rule -> `Costs`, or None where a rule could not be used; `clean` comes
    first. `cost` compares with the same rule's clean run, `class_cost` is that of the class which
    loses most, `against_default` compares with the default rule's clean run (NaN without one).
    `worst` maps rule -> its costliest attack.
    """
    rules, threats = [*study.chains()], [CLEAN, *study.threats()]

    def cells(rule: str, threat: str) -> list[Mapping[str, Any]]:
        return [found.get((f"{rule} / {threat}", seed), {}) for seed in study.seeds]

    rows: dict[str, dict[str, Costs | None]] = {threat: {} for threat in threats}
    for rule in rules:
        default = _accuracy(cells(rules[0], CLEAN))
        for threat in threats:
            rows[threat][rule] = _costs(cells(rule, threat), cells(rule, CLEAN), default)
    worst = {}
    for rule in rules:
        costs = {t: row[rule]["cost"] for t, row in _lies(rows) if row[rule] is not None}
        if costs:
            attack = max(costs, key=lambda name: costs[name])
            worst[rule] = {"attack": attack, "cost": costs[attack]}
    problems = {
        rule: cell["problem"]
        for rule in rules
        for threat in threats
        for cell in cells(rule, threat)
        if cell.get("problem")
    }
    return {
        "clients": study.experiment.clients,
        "attackers": {seed: list(attackers_of(study, seed)) for seed in study.seeds},
        "default": rules[0],
        "rows": rows,
        "worst": worst,
        "problems": problems,
    }


def _lies(rows: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows in which attackers send something."""
    return [(threat, row) for threat, row in rows.items() if threat not in (CLEAN, FIRST)]


def _accuracy(cells: list[Mapping[str, Any]]) -> float | None:
    known = [cell["accuracy"] for cell in cells if cell.get("accuracy") is not None]
    return statistics.fmean(known) if len(known) == len(cells) else None


def _per_class(cells: list[Mapping[str, Any]]) -> np.ndarray:
    known = [np.array(cell["per_class"], dtype=float) for cell in cells if cell.get("per_class")]
    return np.nanmean(known, axis=0) if len(known) == len(cells) else np.full(1, np.nan)


def _costs(
    attacked: list[Mapping[str, Any]], clean: list[Mapping[str, Any]], default: float | None
) -> Costs | None:
    accuracy, own = _accuracy(attacked), _accuracy(clean)
    if accuracy is None or own is None:
        return None
    lost = 100 * (_per_class(clean) - _per_class(attacked))
    return {
        "accuracy": accuracy,
        "cost": 100 * (own - accuracy),
        "class_cost": float(np.max(lost, initial=-100.0)),
        "against_default": 100 * (as_float(default) - accuracy),
        "refused": sum(sum(cell.get("refused", {}).values()) for cell in attacked),
    }


def write(study: AttackConfig, facts: Record, folder: Path) -> Path:
    """`report.html` in the study's folder; returns its path."""
    return page.write(folder / REPORT, make_page(study, facts, folder))


def make_page(study: AttackConfig, facts: Record, folder: Path) -> Page:
    """Everything on the page."""
    rows, rules = facts["rows"], [*facts["worst"]]
    described = [(name, ATTACKS.summary(threat.name)) for name, threat in study.threats().items()]
    cards = [
        Card(
            "What attacks cost",
            "Points of the student's test accuracy that a rule (column) loses to an attack (row), "
            "against its own run without attackers; in the row “clean” the accuracy itself. Blue "
            "is a gain. “absent” is what is lost if the attackers simply stay away: no defence "
            "that only removes them does better. A dot marks messages that were refused.",
            [heat_map(facts)] if rules else (),
        ),
        Card(
            "Rules",
            f"Loss against {facts['default']} without attackers counts what a rule costs in peace "
            "too.",
            table=plain([*words("rule"), *_RULE], [_rule(facts, rule) for rule in rules]),
        ),
        Card(
            "The class that loses most",
            "Points of accuracy on the class that an attack costs most: an attack on one class of "
            "many hardly moves the mean.",
            table=_per_rule(facts, "class_cost", [*rows][1:]),
        ),
        Card(
            "Accuracy",
            "Test accuracy of the student in percent.",
            table=_per_rule(facts, "accuracy", rows),
        ),
        Card(
            "Attacks",
            "Attackers see what honest clients send before they send their own.",
            table=plain(words("attack", "what it does"), described),
        ),
    ]  # fmt: skip
    if facts["problems"]:
        cards.append(
            Card(
                "Not tried",
                "These rules need something that the experiment lacks.",
                table=plain(words("rule", "reason"), facts["problems"].items()),
            )
        )
    return Page(
        title=f"{study.name}: attacks on the knowledge",
        sentence=(
            f"{study.num_attackers} of {study.experiment.clients} clients attack; "
            f"{count(len(rows) - 2, 'attack')} on {count(len(rules), 'fusion rule')}. Differences "
            "of a point or two on few test images are within what another seed would change."
        ),
        sections=[
            Section("results", "Results", cards),
            page.config_section(
                folder, read_json(folder / "versions.json", dict[str, str]), "attack"
            ),
        ],
        footer=folder.name,
        remarks=[seeds(study.seeds)],
        tiles=page.size_tile(facts["tests"], _clean(facts)),
        **page.progress(facts),
    )


def _clean(facts: Record) -> float | None:
    """The accuracy of the default rule without attackers, as far as known."""
    cell = facts["rows"].get(CLEAN, {}).get(facts["default"])
    return None if cell is None else cell["accuracy"]


def _per_rule(facts: Record, key: str, threats: Iterable[str]) -> Table:
    rules = [*facts["worst"]]
    rows = [[t, *(_shown(facts["rows"][t][rule], key) for rule in rules)] for t in threats]
    return plain([*words("attack"), *numbers(*rules)], rows)


def costs_table(facts: Record) -> Table:
    """Clean accuracy and costs by rule, for the console; rules that do not fit are numbered."""
    rules = [*facts["worst"]]
    fits = sum(len(rule) + 3 for rule in rules) <= 60
    names = rules if fits else [str(place) for place, _ in enumerate(rules, start=1)]
    rows = [
        Row(
            [threat, *(_shown(row[rule], "cost" if place else "accuracy") for rule in rules)],
            begins=place in (1, 2),
        )
        for place, (threat, row) in enumerate(facts["rows"].items())
    ]
    return Table(
        [*words("attack"), *numbers(*names)],
        rows,
        f"{facts['name']}: test accuracy clean (%), then points lost to each attack",
        "" if fits else "\n".join(f"{n}: {rule}" for n, rule in enumerate(rules, start=1)),
    )


@style()
def heat_map(facts: Record) -> Figure:
    """Attacks in rows (clean first), rules in columns, the cost in each cell."""
    rules, threats = [*facts["worst"]], [*facts["rows"]]
    cells = [[facts["rows"][threat][rule] for rule in rules] for threat in threats]
    costs = np.array([[(c or {}).get("cost", np.nan) for c in row] for row in cells], dtype=float)
    costs[0] = 0.0

    def text(row: int, column: int, cost: float) -> str:
        cell = cells[row][column]
        if row == 0 or cell is None:
            return percent((cell or {}).get("accuracy"))
        return number(cost, ".1f") + (" ·" if cell["refused"] else "")

    figure, axes = canvas(3.0 + 0.85 * len(rules), 1.3 + 0.27 * len(threats))
    # A chain takes a line for each rule, so that nothing of it has to be cut off.
    chains = [" →\n".join(short(part, 26) for part in rule.split(" → ")) for rule in rules]
    most = max(10.0, 10 * np.ceil(np.nanmax(np.abs(costs), initial=0.0) / 10))
    image = heat(axes, costs, SIGNED, (-most, most), rows=threats, text=text)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(rules)), chains, rotation=35, ha="left", fontsize=8)
    axes.axhline(0.5, color=INK, lw=1)
    axes.axhline(1.5, color=INK, lw=0.6, ls=":")
    scale(figure, image, axes, "points lost")
    return figure


def _rule(facts: Record, rule: str) -> list[str]:
    lies = [row[rule] for _, row in _lies(facts["rows"]) if row[rule] is not None]
    worst = facts["worst"][rule]
    against = max(cell["against_default"] for cell in lies)
    mean = statistics.fmean(cell["cost"] for cell in lies)
    clean = _shown(facts["rows"][CLEAN][rule], "accuracy")
    return [
        rule,
        clean,
        worst["attack"],
        *(number(v, ".1f") for v in (worst["cost"], mean, against)),
    ]


def _shown(cell: Costs | None, key: str) -> str:
    return number(None if cell is None else cell[key] * (100 if key == "accuracy" else 1), ".1f")
