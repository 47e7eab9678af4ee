"""`fedkd config`: look at configs."""

from __future__ import annotations

import sys

import typer

from fedkd.config import Experiment
from simulations.cli.arguments import Config, Overrides
from simulations.cli.configs import load

app = typer.Typer(help="Look at configs.", no_args_is_help=True)


@app.command("show")
def show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config, every default written out."""
    from fedkd.build import check

    experiment = load(Experiment, config, overrides or [], "config show")
    check(experiment)
    sys.stdout.write(experiment.to_yaml())
