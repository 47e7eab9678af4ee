"""`fedkd inspect`: what of its teachers a student has taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.arguments import Trust
from fedkd.simulations.cli.ending import interruptible, show, typed


def inspect(
    path: Annotated[Path, typer.Argument(help="a run directory, or the folder of fedkd distill")],
    what: Annotated[
        str, typer.Option(help="properties, a,b,c; fedkd list properties shows them")
    ] = "all",
    images: Annotated[int, typer.Option(help="test images looked at, at most")] = 500,
    triplets: Annotated[int, typer.Option(help="planes for the decision boundaries")] = 50,
    groups: Annotated[
        Path | None, typer.Option(help=".npz with an array group: bias by it, not by class")
    ] = None,
    marker: Annotated[
        str | None, typer.Option(help="class that a white square in the corner may stand for")
    ] = None,
    trust: Trust = False,
) -> None:
    """Show what the student took over beside accuracy: where it looks, what fools it, …"""
    from fedkd.simulations.cli.configs import open_run
    from fedkd.simulations.cli.progress import ProgressView
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.cli.tables import console_table
    from fedkd.studies.engine import kind_of
    from fedkd.studies.inspection.report import PAGE, properties_table
    from fedkd.studies.inspection.study import Options, inspect_run, inspect_study

    options = Options(what, images, triplets, groups, marker, typed(path))
    options.check()
    kind = kind_of(path)
    if kind not in (None, "distill"):
        raise ConfigError(
            f"{path}: is a folder of fedkd {kind}; expected a run directory, or the folder of "
            "fedkd distill"
        )
    run = None if kind else open_run(path, trust=trust)
    console = screen()
    kept = "independent students trained so far are kept: ask again"
    with interruptible(kept), ProgressView(console, f"inspect {path}") as view:
        if run is None:
            facts = inspect_study(path, options, view, trust=trust)
        else:
            facts = inspect_run(run, options, view)
    console.print(console_table(properties_table(facts)))
    for note in facts["notes"]:
        console.print(note, markup=False, highlight=False)
    show(console, "page", path.expanduser().resolve() / PAGE)
