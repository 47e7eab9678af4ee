"""`fedkd report`: the page of a folder again."""

from __future__ import annotations

from fedkd.simulations.cli.arguments import RunPath, Trust
from fedkd.simulations.cli.ending import show
from fedkd.simulations.cli.screen import screen


def report(path: RunPath, trust: Trust = False) -> None:
    """Write the HTML report of a run or a study again; print its table."""
    from fedkd.reporting.run_page import write_report
    from fedkd.runs.directory import RunDirectory
    from fedkd.simulations.cli.study import report_again
    from fedkd.simulations.cli.tables import run_tables
    from fedkd.studies.engine import kind_of

    if (command := kind_of(path)) is not None:
        report_again(path, command, trust=trust)
        return
    directory = RunDirectory.open(path, trust=trust)
    written = write_report(directory)
    console = screen()
    if directory.read_json("summary.json") is not None:
        console.print(run_tables(directory))
    show(console, "report", written)
