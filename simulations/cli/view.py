"""`fedkd view`: a page over a folder of runs and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkd.simulations.cli.ending import show
from fedkd.simulations.cli.screen import screen


def view(
    runs: Annotated[Path, typer.Argument(help="a folder of runs and studies, e.g. runs")],
    out: Annotated[
        Path | None, typer.Option(help="the page; default: index.html in that folder")
    ] = None,
) -> None:
    """Write a page over a folder of runs: a table, curves side by side, configs compared."""
    from fedkd.studies.index import write_index

    show(screen(), "view", write_index(runs, out))
