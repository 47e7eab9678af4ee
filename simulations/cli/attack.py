"""`fedkd attack`: every attack on every fusion rule."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simulations.cli.arguments import Overrides, TeacherWeights
from simulations.cli.study import Resume, run_command


def attack(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/attack/quickstart.yaml")
    ] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    trust: TeacherWeights = False,
) -> None:
    """Try attacks on the knowledge against fusion rules: what does each cost the student?"""
    from fedkd.studies.attack.study import AttackStudy
    from simulations.cli.steps import StepView

    run_command(
        AttackStudy, config, overrides, resume, trust=trust,
        example="attack/quickstart.yaml", view=StepView, table=costs_table,
    )  # fmt: skip


def costs_table(facts: dict[str, Any]) -> Any:
    """Clean accuracy and costs by rule; rules that do not fit are numbered."""
    from rich.table import Table

    shown = Table(
        title=f"{facts['name']}: test accuracy clean (%), then points lost to each attack",
        title_justify="left",
    )
    rules = [*facts["worst"]]
    short = sum(len(rule) + 3 for rule in rules) <= 60
    if not short:  # a number for each, in the caption
        shown.caption = "\n".join(f"{number}: {rule}" for number, rule in enumerate(rules, 1))
        shown.caption_justify = "left"
    shown.add_column("attack", no_wrap=True)
    for number, rule in enumerate(rules, start=1):
        shown.add_column(rule if short else str(number), justify="right")
    for number, (threat, row) in enumerate(facts["rows"].items()):
        cells = [row[rule] for rule in rules]
        key, factor = ("accuracy", 100) if number == 0 else ("cost", 1)
        shown.add_row(threat, *("–" if c is None else f"{factor * c[key]:.1f}" for c in cells))
        if number < 2:
            shown.add_section()
    return shown
