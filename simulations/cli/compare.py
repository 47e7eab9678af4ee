"""`fedkd compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.cli.arguments import Trust
from simulations.cli.study import Resume, run_command


def compare(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/compare/quickstart.yaml")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. seeds=[0,1] only=[fedkd,fedavg] experiment.rounds=2"),
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
) -> None:
    """Compare fedkd and baselines on one split: accuracy, bytes, calibration, several seeds."""
    run_command("compare", config, overrides, resume, trust=trust)
