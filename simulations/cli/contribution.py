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
    from fedkd.rounds import workspace_of
    from fedkd.studies import contribution as measured
    from fedkd.studies.unlearning import check_removal
    from simulations.cli.live import Interrupted
    from simulations.cli.screen import screen
    from simulations.cli.steps import StepView

    run = open_run(path, trust=trust)
    if students:
        check_removal(run, [0])  # feedback, or rounds that are gone: said before the work
    space = workspace_of(run)
    console = screen()
    facts: dict[str, Any] = {}
    try:
        with StepView(console, "contribution") as view:
            facts = measured.contribution(
                run, space, all_rounds=all_rounds, permutations=permutations, notify=view
            )
            if students:
                facts = measured.leave_one_out_students(run, space, view)
    except Interrupted:
        print("interrupted; students distilled so far are kept: ask again", file=sys.stderr)
        sys.exit(130)
    page = measured.write_page(run, facts)
    console.print(_table(facts))
    console.print(f"page    {page}", soft_wrap=True, highlight=False, markup=False)


def _table(facts: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from fedkd.studies.contribution import carried

    everybody, nobody = (100 * facts[key]["accuracy"] for key in ("everybody", "nobody"))
    table = Table(
        title=f"contribution to the ensemble: {everybody:.1f} % with everybody, {nobody:.1f} % by "
        "guessing (points of test accuracy, nothing distilled again)",
        title_justify="left",
    )
    table.add_column("client", justify="right")
    for name in ("fair share", "lost if it goes", "nats"):
        table.add_column(name, justify="right")
    table.add_column("carries")
    students = facts.get("students", {}).get("clients", {})
    if students:
        table.add_column("student loses", justify="right")
    ordered = sorted(facts["clients"].items(), key=lambda item: -item[1]["share"])
    for client, row in ordered:
        error = f" ± {100 * row['share_error']:.2f}" if facts["permutations"] else ""
        cells = [
            str(client),
            f"{100 * row['share']:+.2f}{error}",
            f"{100 * row['influence']:+.2f}",
            f"{row['share_log_likelihood']:+.3f}",
            escape(", ".join(carried(facts, client)) or "–"),
        ]
        if students:
            told = students.get(client) or students.get(str(client))
            cells.append("–" if told is None else f"{100 * told['influence']:+.2f}")
        table.add_row(*cells)
    return table
