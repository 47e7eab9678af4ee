"""`fedkd ablate`: a grid of fedkd's own options."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.cli.arguments import TeacherWeights
from simulations.cli.compare import Resume, side_by_side


def ablate(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/ablate/fusion.yaml")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. seeds=[0,1] mode=each rounds=2")
    ] = None,
    resume: Resume = None,
    trust: TeacherWeights = False,
) -> None:
    """Try a grid of options over several seeds: which choice matters, and what it costs."""
    from simulations.compare.grid import Ablation

    side_by_side(Ablation, config, overrides or [], resume, "ablate", trust=trust)
