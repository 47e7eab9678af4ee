"""`fedkd quarantine`: who was left out for good, and letting them in again."""

from __future__ import annotations

from typing import Annotated

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.arguments import RunPath
from fedkd.simulations.cli.configs import open_run


def quarantine(
    path: RunPath,
    lift: Annotated[
        list[int] | None, typer.Option(help="let this client take part again (may be repeated)")
    ] = None,
) -> None:
    """Show strikes against clients and who is in quarantine; lift it."""
    from rich.table import Table
    from rich.text import Text

    from fedkd.runs import quarantine as room
    from fedkd.simulations.cli.screen import screen

    run = open_run(path)
    console = screen()
    for client in lift or []:
        if not 0 <= client < run.experiment.clients:
            raise ConfigError(
                f"--lift {client}: this run's clients are 0 to {run.experiment.clients - 1}"
            )
        console.print(f"client {client}: {room.lift(run, client)} strikes forgotten")
    options = run.experiment.federation.quarantine
    out = room.quarantined(run, options)
    limit = "never (federation.quarantine.after)" if options.after is None else str(options.after)
    table = Table(title=f"strikes; quarantine after: {limit}", title_justify="left")
    for name in ("client", "strikes", "quarantine"):
        table.add_column(name, justify="right")
    table.add_column("reasons", overflow="fold")
    for client, reasons in sorted(room.strikes(run).items()):
        where = "yes" if client in out else "no"
        table.add_row(str(client), str(len(reasons)), where, Text("\n".join(reasons[-5:])))
    console.print(table if table.row_count else "no strikes")
