"""`fedkd attack`: every attack on every fusion rule."""

from __future__ import annotations

from typing import Annotated

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
    from fedkd.studies.attack.report import costs_table
    from fedkd.studies.attack.study import AttackStudy
    from simulations.cli.steps import StepView

    run_command(
        AttackStudy, config, overrides, resume, trust=trust,
        example="attack/quickstart.yaml", view=StepView, table=costs_table,
    )  # fmt: skip
