"""What each client gives to the ensemble, as a table and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedkd.reporting import page
from fedkd.reporting.drawing import PSEUDO, SIGNED, STUDENT, Dot, canvas, dots, heat, scale, style
from fedkd.reporting.format import DASH, number, percent, points, short
from fedkd.reporting.page import Card, Page, Section
from fedkd.reporting.table import Row, Table, numbers, words
from fedkd.runs.directory import RunDirectory


def write_page(run: RunDirectory, facts: Mapping[str, Any]) -> Path:
    """`contribution.html` in the run's folder."""
    permutations, rounds = facts["permutations"], facts["rounds"]
    how = f"{permutations} random orders, truncated" if permutations else "exact, all coalitions"
    which = f"round {rounds[-1]}" if len(rounds) == 1 else "mean of all rounds"
    cards = [
        Card(
            "Fair shares and leave-one-out influence",
            "The share is what a client adds on average over all orders of arrival; shares "
            "add up to the gain over guessing. Influence is what is lost if only this client "
            "goes: near zero where others know the same.",
            [_shares(facts["clients"])],
        ),
        Card(
            "Clients",
            "Positive is good for the ensemble: what a client adds, what is lost without it.",
            table=clients_table(facts),
        ),
        Card(
            "Who carries which class",
            "Share of each class's accuracy in points; red cells hurt a class.",
            [_classes(facts["clients"], facts["classes"])],
        ),
    ]
    return page.write(
        run.path / "contribution.html",
        Page(
            title="Who carries the ensemble",
            sentence=(
                f"Test accuracy of the fused ensemble ({' → '.join(facts['fusion'])}), {which}: "
                f"{percent(facts['everybody']['accuracy'])} with everybody, "
                f"{percent(facts['nobody']['accuracy'])} by guessing. Shapley values: {how}. "
                "Measured on the ensemble, without distilling again; a student also generalises, "
                "so its gain or loss may differ."
            ),
            sections=[
                Section("results", "Results", cards),
                Section("again", "Again", [page.again(facts.get("command", ""))]),
            ],
            footer=run.identity,
        ),
    )


def clients_table(facts: Mapping[str, Any]) -> Table:
    """One row for each client, largest share first."""
    students = facts.get("students", {}).get("clients", {})
    columns = [
        *numbers("client", "fair share"),
        *(numbers("± error") if facts["permutations"] else ()),
        *numbers("lost if it goes", "nats"),
        *words("carries"),
        *(numbers("student loses") if students else ()),
    ]
    rows = []
    for client, row in sorted(facts["clients"].items(), key=lambda item: -item[1]["share"]):
        cells = [str(client), points(row["share"], 2, "")]
        if facts["permutations"]:
            cells.append(number(100 * row["share_error"], ".2f"))
        cells += [points(row["influence"], 2, ""), number(row["share_log_likelihood"], "+.3f")]
        cells.append(", ".join(carried(facts, client)) or DASH)
        if students:
            without = students.get(client) or students.get(str(client))
            cells.append(DASH if without is None else points(without["influence"], 2, ""))
        rows.append(Row(cells))
    everybody, nobody = (percent(facts[key]["accuracy"]) for key in ("everybody", "nobody"))
    return Table(
        columns,
        rows,
        f"contribution to the ensemble: {everybody} with everybody, {nobody} by guessing (points "
        "of test accuracy, nothing distilled again)",
    )


def carried(facts: Mapping[str, Any], client: int | str, most: int = 3) -> list[str]:
    """Classes to which no client contributes more than this one, largest share first."""
    table = {key: row["per_class"] for key, row in facts["clients"].items()}
    own = table[client]
    best = [
        c for c in range(len(own)) if own[c] > 0 and own[c] == max(r[c] for r in table.values())
    ]
    best.sort(key=lambda c: -own[c])
    names = [facts["classes"][c] for c in best[:most]]
    return [*names, "…"] if len(best) > most else names


def _shares(clients: Mapping[Any, Mapping[str, float]]) -> Figure:
    """One row per client, largest share on top: its share with its error, a ring for influence."""
    rows = []
    for client, row in sorted(clients.items(), key=lambda item: -item[1]["share"]):
        share, error = 100 * row["share"], 100 * row["share_error"]
        color = STUDENT if share >= 0 else PSEUDO
        ends = (share - error, share + error) if error else (0.0, share)
        rows.append(Dot(f"client {client}", share, ends, ring=100 * row["influence"], color=color))
    label = "points of test accuracy of the ensemble"
    return dots(rows, label, label="fair share", ring="influence (left out alone)", zero=0.0)


@style()
def _classes(clients: Mapping[Any, Mapping[str, Any]], classes: Sequence[str]) -> Figure:
    values = 100 * np.asarray([row["per_class"] for row in clients.values()], dtype=float)
    figure, axes = canvas(min(11.0, 2.6 + 0.55 * len(classes)), 1.0 + 0.3 * len(values))
    limit = max(float(np.abs(values).max(initial=0)), 1e-9)
    image = heat(
        axes,
        values,
        SIGNED.reversed(),
        (-limit, limit),
        rows=[f"client {client}" for client in clients],
        columns=[short(name, 10) for name in classes],
        text=(lambda _row, _column, value: number(value)) if len(classes) <= 20 else None,
    )
    scale(figure, image, axes, "points")
    return figure
