"""`fedkd ablate`: a grid of fedkd's own options."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.cli.arguments import Trust
from simulations.cli.study import Resume, run_command


def ablate(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/ablate/fusion.yaml")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. seeds=[0,1] mode=each experiment.rounds=2"),
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
) -> None:
    """Try a grid of options over several seeds: which choice matters, and what it costs."""
    run_command("ablate", config, overrides, resume, trust=trust)
