"""`fedkd contribution`: what each client gives."""

from __future__ import annotations

from typing import Annotated

import typer

from fedkd.simulations.cli.arguments import RunPath, Trust
from fedkd.simulations.cli.configs import open_run
from fedkd.simulations.cli.ending import interruptible, show, typed


def contribution(
    path: RunPath,
    all_rounds: Annotated[
        bool, typer.Option("--all-rounds", help="the mean of all rounds, not the last one")
    ] = False,
    permutations: Annotated[
        int, typer.Option(min=2, help="random orders for Shapley values with over 8 clients")
    ] = 200,
    students: Annotated[
        bool, typer.Option("--students", help="also distil anew without each client (slow)")
    ] = False,
    trust: Trust = False,
) -> None:
    """Show what each client gives to the ensemble: influence, fair share, classes."""
    from fedkd.rounds import context_of_run
    from fedkd.simulations.cli.progress import ProgressView
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.cli.tables import console_table
    from fedkd.studies import contribution as measured
    from fedkd.studies.contribution_report import clients_table, write_page
    from fedkd.studies.unlearning import check_removal

    run = open_run(path, trust=trust)
    if students:
        check_removal(run, [0])  # feedback, or rounds that are gone: refused before the work
    space = context_of_run(run)
    console = screen()
    kept = "students distilled so far are kept: ask again"
    with interruptible(kept), ProgressView(console, "contribution") as view:
        facts = measured.contribution(
            run, space, all_rounds=all_rounds, permutations=permutations, notify=view
        )
        if students:
            facts = measured.leave_one_out_students(run, space, view)
    page = write_page(run, {**facts, "command": typed(path)})
    console.print(console_table(clients_table(facts)))
    show(console, "page", page)
