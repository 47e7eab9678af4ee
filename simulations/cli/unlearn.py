"""`fedkd unlearn`: the student without some clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.arguments import RunPath, Trust
from fedkd.simulations.cli.configs import open_run
from fedkd.simulations.cli.ending import interruptible, show


def unlearn(
    path: RunPath,
    client: Annotated[list[int], typer.Option(help="client to take out (may be repeated)")],
    quick: Annotated[
        bool, typer.Option("--quick", help="go on from the last student: fast, approximate")
    ] = False,
    influenced: Annotated[
        bool,
        typer.Option(
            "--influenced", help="accept that feedback let other teachers learn from them"
        ),
    ] = False,
    erase: Annotated[
        bool, typer.Option("--erase", help="then delete what the old run holds of them")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="erase without asking")] = False,
    trust: Trust = False,
) -> None:
    """Distil the student again from what the run stored, without some clients."""
    from fedkd.reporting.run_page import write_report
    from fedkd.rounds import context_of_run
    from fedkd.rounds.summary import summarise
    from fedkd.runs.directory import Session
    from fedkd.simulations.cli.progress import ProgressView
    from fedkd.simulations.cli.screen import screen
    from fedkd.studies import unlearning

    if quick and erase:
        raise ConfigError("--erase needs the exact way: the quick one only writes over")
    run = open_run(path, trust=trust)
    run.import_plugins()
    without = sorted(set(client))
    unlearning.check_removal(run, without, influenced=influenced)
    console = screen()
    exact = unlearning.find_exact(run, without)
    title = f"{run.identity} without {', '.join(map(str, without))}"
    with interruptible("the same command goes on"), ProgressView(console, title) as view:
        if quick:
            server = unlearning.continue_without(run, without, context_of_run(run), view)
        else:
            new = unlearning.prepare(run, without)
            server = unlearning.distil_again(new, context_of_run(new), view)
    facts = unlearning.evidence(run, server, without, exact=exact if quick else None)
    new = server.run
    summary = summarise(server, seconds=Session(new).total)
    if (old := run.read_json("summary.json")) and "oracle" in old:
        summary["oracle"] = old["oracle"]  # labels of the transfer set: no client is in it
    new.write_json("summary.json", summary)
    write_report(new)
    console.print(_table(facts))
    if quick and exact is None:
        console.print("approximate; without --quick the exact student is made to compare with")
    show(console, "run", new.path)
    if erase:
        _erase(console, run, without, yes)


def _erase(console: Any, run: Any, without: list[int], yes: bool) -> None:
    from rich.markup import escape

    from fedkd.studies import unlearning

    paths = unlearning.erasable(run, without)
    if not paths:
        console.print("nothing to erase: the run holds nothing of these clients")
        return
    console.print(f"to be deleted in {run.path}:", soft_wrap=True, highlight=False, markup=False)
    for place in paths:
        console.print(f"  {place.relative_to(run.path)}", highlight=False, markup=False)
    if yes or typer.confirm("delete these for good?"):
        unlearning.erase(run, paths, without)
        console.print(f"erased {len(paths)} entries; numbers in metrics.jsonl and reports stay")
        for other in unlearning.tainted(run, without):
            console.print(
                f"[yellow]note:[/] made from this run, still knows them, delete it yourself: "
                f"{escape(str(other.path))}",
                soft_wrap=True,
                highlight=False,
            )
    else:
        console.print("nothing was deleted")


def _table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    who = ", ".join(map(str, facts["without"]))
    kind = "exact" if facts["mode"] == "exact" else "approximate"
    if facts["influenced"]:
        kind += ", but the other teachers had learnt from the student by feedback"
    table = Table(title=f"without client {who}: {kind}", title_justify="left")
    table.add_column("student")
    for name in ("test accuracy", "agrees with the new one"):
        table.add_column(name, justify="right")
    for client in facts["opinions"]:
        table.add_column(f"follows {client} against the rest", justify="right")
        table.add_column(f"KL from {client}", justify="right")
    for name, row in facts["students"].items():
        cells = [name, f"{100 * row['accuracy']:.2f} %", f"{100 * row['agrees_with_after']:.1f} %"]
        for opinion in facts["opinions"].values():
            follows = opinion[name]["follows"]
            cells.append("–" if follows is None else f"{100 * follows:.1f} %")
            cells.append(f"{opinion[name]['divergence']:.3f}")
        table.add_row(*cells)
    table.caption = f"student {facts['hash']}"
    return table
