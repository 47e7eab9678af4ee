"""`fedkd attack`: every attack on every fusion rule."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.cli.arguments import Overrides, Trust
from simulations.cli.study import Resume, run_command


def attack(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/attack/quickstart.yaml")
    ] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    trust: Trust = False,
) -> None:
    """Try attacks on the knowledge against fusion rules: what does each cost the student?"""
    run_command("attack", config, overrides, resume, trust=trust)
