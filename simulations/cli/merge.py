"""`fedkd merge`: one study of folders whose cells were run apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.arguments import Trust
from fedkd.simulations.cli.screen import screen


def merge(
    folders: Annotated[list[Path], typer.Argument(help="folders of studies of one config")],
    into: Annotated[Path, typer.Option(help="the new folder")],
    trust: Trust = False,
) -> None:
    """Put studies of one config, run apart by seed or row, together: one folder, one page."""
    from fedkd.simulations.cli.study import kind_named, show_results
    from fedkd.studies.engine import kind_of, present
    from fedkd.studies.merging import merge as merged

    command = kind_of(folders[0])
    if command is None:
        raise ConfigError(f"{folders[0]} is not the folder of a study (it has no such config.yaml)")
    kind = kind_named(command)
    result = merged(kind.study, folders, into, trust=trust)
    results = present(result.study, result.folder)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    show_results(screen(), result.folder.path, kind, results)
    if not results["finished"]:
        trusted = " --trust" if result.folder.config.plugins else ""
        print(
            f"not all cells are finished; go on with: fedkd {command} --resume "
            f"{result.folder.path}{trusted}",
            file=sys.stderr,
        )
