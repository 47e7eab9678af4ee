"""A study of attacks as numbers, a heat map and a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.attacks import ATTACKS
from fedkd.attacks.config import FIRST, AttackStudy
from fedkd.reporting import figures, page
from fedkd.runs.directory import write_json
from fedkd.studies.attack import CLEAN, Cell, attackers_of

DASH = "\N{EN DASH}"


def table(study: AttackStudy, results: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of every cell, with costs in points of accuracy.

    `rows` maps threat -> rule -> {accuracy, cost, class_cost, against_default, refused} or None
    where a rule could not be used; `clean` comes first. `cost` compares with the same rule's clean
    run, `class_cost` is that of the class which loses most, `against_default` compares with the
    default rule's clean run. `worst` maps rule -> its costliest attack.
    """
    rules, threats = [*study.chains()], [CLEAN, *study.threats()]

    def mean(rule: str, threat: str) -> float | None:
        told = [results[Cell(seed, rule, threat)].get("accuracy") for seed in study.seeds]
        known = [value for value in told if value is not None]
        return statistics.fmean(known) if len(known) == len(told) else None

    def per_class(rule: str, threat: str) -> np.ndarray:
        cells = [results[Cell(seed, rule, threat)].get("per_class") for seed in study.seeds]
        known = [np.array(c, dtype=float) for c in cells if c is not None]
        return np.nanmean(known, axis=0) if len(known) == len(cells) else np.full(1, np.nan)

    base = {rule: mean(rule, CLEAN) for rule in rules}
    default = base[rules[0]]
    rows: dict[str, dict[str, Any]] = {}
    for threat in threats:
        rows[threat] = {}
        for rule in rules:
            accuracy, own = mean(rule, threat), base[rule]
            refused = sum(
                sum(results[Cell(seed, rule, threat)].get("refused", {}).values())
                for seed in study.seeds
            )
            rows[threat][rule] = None if accuracy is None or own is None else {
                "accuracy": accuracy,
                "cost": 100 * (own - accuracy),
                "class_cost": float(np.max(
                    100 * (per_class(rule, CLEAN) - per_class(rule, threat)), initial=-100.0
                )),
                "against_default": None if default is None else 100 * (default - accuracy),
                "refused": refused,
            }  # fmt: skip
    lies = [threat for threat in threats if threat not in (CLEAN, FIRST)]
    worst = {}
    for rule in rules:
        costs = {t: rows[t][rule]["cost"] for t in lies if rows[t][rule] is not None}
        if costs:
            attack = max(costs, key=lambda name: costs[name])
            worst[rule] = {"attack": attack, "cost": costs[attack]}
    problems = {
        cell.rule: result["problem"] for cell, result in results.items() if "problem" in result
    }
    return {
        "name": study.name,
        "clients": study.experiment.clients,
        "attackers": {seed: list(attackers_of(study, seed)) for seed in study.seeds},
        "default": rules[0],
        "rows": rows,
        "worst": worst,
        "problems": problems,
    }


def write(study: AttackStudy, results: Mapping[Cell, dict[str, Any]], folder: Path) -> Path:
    """`attack.json` and `report.html` in the study's folder; returns the page's path."""
    facts = table(study, results)
    write_json(folder / "attack.json", facts)
    rules = [*facts["worst"]]
    with figures.style():
        picture = figures.svg(heat_map(facts), "attacks")
    cards = [
        page.Card(
            "What attacks cost",
            "Points of the student's test accuracy that a rule (column) loses to an attack (row), "
            "against its own run without attackers; in the row “clean” the accuracy itself. Blue "
            "is a gain. “absent” is what is lost if the attackers simply stay away: no defence "
            "that only removes them does better. A dot marks messages that were refused.",
            picture=picture,
        ),
        page.Card(
            "Rules",
            f"Loss against {facts['default']} without attackers counts what a rule costs in peace "
            "too.",
            header=["rule", "clean, %", "worst attack", "worst cost", "mean cost",
                    "worst against the default"],
            rows=[_rule(facts, rule) for rule in rules],
        ),
        page.Card(
            "The class that loses most",
            "Points of accuracy on the class that an attack costs most: an attack on one class of "
            "many hardly moves the mean.",
            header=["attack", *rules],
            rows=[
                [threat, *(_points(row[rule], "class_cost") for rule in rules)]
                for threat, row in facts["rows"].items()
                if threat != CLEAN
            ],
        ),
        page.Card(
            "Accuracy",
            "Test accuracy of the student in per cent.",
            header=["attack", *rules],
            rows=[
                [threat, *(_percent(row[rule]) for rule in rules)]
                for threat, row in facts["rows"].items()
            ],
        ),
        page.Card(
            "Attacks",
            "Attackers hear what honest clients send before they answer.",
            numbers=False,
            header=["attack", "what it does"],
            rows=[
                [name, ATTACKS.summary(threat.name)] for name, threat in study.threats().items()
            ],
        ),
    ]  # fmt: skip
    if facts["problems"]:
        cards.append(
            page.Card(
                "Not tried",
                "These rules need something that the experiment lacks.",
                numbers=False,
                header=["rule", "reason"],
                rows=[[rule, text] for rule, text in facts["problems"].items()],
            )
        )
    count = len(study.seeds)
    return page.write(
        folder / "report.html",
        title=f"{study.name}: attacks on the knowledge",
        sentence=(
            f"{study.num_attackers} of {study.experiment.clients} clients attack; "
            f"{len(facts['rows']) - 2} attacks on {len(rules)} fusion rules, "
            f"{count} seed{'s' if count > 1 else ''}. Differences of a point or two on few test "
            "images are within what another seed would change."
        ),
        cards=cards,
        footer=folder.name,
    )


def heat_map(facts: Mapping[str, Any]) -> Any:
    """Attacks in rows (clean first), rules in columns, the cost in each cell."""
    rules, threats = [*facts["worst"]], [*facts["rows"]]
    costs = np.array(
        [[_number(facts["rows"][t][r], "cost") for r in rules] for t in threats], dtype=float
    )
    costs[0] = 0.0
    figure, axes = figures.canvas(3.0 + 0.85 * len(rules), 1.3 + 0.27 * len(threats))
    # Beyond 30 points a student is lost, and small costs should stay visible.
    image = axes.imshow(costs, cmap="RdBu_r", vmin=-30, vmax=30, aspect="auto")
    axes.xaxis.tick_top()
    # A chain takes a line for each rule, so that nothing of it has to be cut off.
    chains = [" →\n".join(figures.short(part, 26) for part in r.split(" → ")) for r in rules]
    axes.set_xticks(range(len(rules)), chains, rotation=35, ha="left", fontsize=8)
    axes.set_yticks(range(len(threats)), threats)
    axes.grid(visible=False)
    axes.axhline(0.5, color=figures.INK, lw=1)
    axes.axhline(1.5, color=figures.INK, lw=0.6, ls=":")
    for (row, column), cost in np.ndenumerate(costs):
        cell = facts["rows"][threats[row]][rules[column]]
        if cell is None:
            text = DASH
        elif row == 0:
            text = f"{100 * cell['accuracy']:.1f} %"
        else:
            text = f"{cost:.1f}".replace("-", "\N{MINUS SIGN}") + (" ·" if cell["refused"] else "")
        axes.annotate(
            text, (column, row), ha="center", va="center", fontsize=7.5,
            color="white" if abs(cost) > 18 else figures.INK,
        )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, label="points lost")
    bar.outline.set_visible(False)
    return figure


def _rule(facts: Mapping[str, Any], rule: str) -> list[str]:
    cells = {t: row[rule] for t, row in facts["rows"].items() if row[rule] is not None}
    lies = [cell for threat, cell in cells.items() if threat not in (CLEAN, FIRST)]
    worst = facts["worst"][rule]
    against = max((c["against_default"] for c in lies if c["against_default"] is not None),
                  default=float("nan"))  # fmt: skip
    return [
        rule, _percent(cells[CLEAN]), worst["attack"], f"{worst['cost']:.1f}",
        f"{statistics.fmean(cell['cost'] for cell in lies):.1f}", f"{against:.1f}",
    ]  # fmt: skip


def _percent(cell: Mapping[str, Any] | None) -> str:
    return DASH if cell is None else f"{100 * cell['accuracy']:.1f}"


def _points(cell: Mapping[str, Any] | None, key: str) -> str:
    return DASH if cell is None else f"{cell[key]:.1f}"


def _number(cell: Mapping[str, Any] | None, key: str) -> float:
    return float("nan") if cell is None else float(cell[key])
