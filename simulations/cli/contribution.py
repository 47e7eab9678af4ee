"""`fedkd contribution`: what each client gives."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from simulations.cli.arguments import RunPath, TeacherWeights
from simulations.cli.configs import open_run


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
    trust: TeacherWeights = False,
) -> None:
    """Show what each client gives to the ensemble: influence, fair share, classes."""
    from fedkd.rounds import Interrupted, context_of_run
    from fedkd.studies import contribution as measured
    from fedkd.studies.contribution_report import clients_table, write_page
    from fedkd.studies.unlearning import check_removal
    from simulations.cli.progress import ProgressView
    from simulations.cli.screen import screen
    from simulations.cli.tables import console_table

    run = open_run(path, trust=trust)
    if students:
        check_removal(run, [0])  # feedback, or rounds that are gone: said before the work
    space = context_of_run(run)
    console = screen()
    facts: dict[str, Any] = {}
    try:
        with ProgressView(console, "contribution") as view:
            facts = measured.contribution(
                run, space, all_rounds=all_rounds, permutations=permutations, notify=view
            )
            if students:
                facts = measured.leave_one_out_students(run, space, view)
    except Interrupted:
        print("interrupted; students distilled so far are kept: ask again", file=sys.stderr)
        sys.exit(130)
    page = write_page(run, facts)
    console.print(console_table(clients_table(facts)))
    console.print(f"page    {page}", soft_wrap=True, highlight=False, markup=False)
