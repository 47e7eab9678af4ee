"""`fedkd distill`: distillation methods side by side, all data in one place."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.cli.arguments import Trust
from simulations.cli.study import Resume, run_command


def distill(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/distill/digits.yaml")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. only=[kd,dkd] experiment.distillation.epochs=5"),
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
) -> None:
    """Compare distillation methods in one place: teachers, a student per method and seed."""
    run_command("distill", config, overrides, resume, trust=trust)
