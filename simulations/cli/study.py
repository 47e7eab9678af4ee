"""What the commands of all studies share: resume, progress, table, paths and exit codes.

How a command ends (`fedkd.simulations.failures` has the codes): interrupted work says how to go on
and is 130; a study of which a cell failed is shown as far as it came, and is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkd.config import ConfigError, Experiment
from fedkd.simulations.cli.configs import STUDIES, load
from fedkd.simulations.cli.ending import interruptible, show
from fedkd.simulations.failures import FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from fedkd.reporting.table import Table
    from fedkd.studies.engine import Record, Study

Resume = Annotated[
    Path | None,
    typer.Option(help="go on in this folder; with a config beside it, only what it changes is run"),
]


Jobs = Annotated[
    int,
    typer.Option(min=1, help="cells at once, each in a process (and on a GPU) of its own, by Ray"),
]


@dataclass(frozen=True)
class Kind:
    """A kind of study, for the console.

    Attributes:
        study: What is run.
        table: What is shown of its results at the end.
        example: A config below configs/.
    """

    study: type[Study[Any, Any]]
    table: Callable[[Record], Table]
    example: str


def kind_named(command: str) -> Kind:
    """The kind of study that a command runs. Raises `ConfigError` if it is none."""
    if command == "attack":
        from fedkd.studies.attack.report import costs_table
        from fedkd.studies.attack.study import AttackStudy

        return Kind(AttackStudy, costs_table, "attack/quickstart.yaml")
    if command in ("compare", "ablate", "privacy sweep"):
        from fedkd.simulations.compare.report import result_table
        from fedkd.simulations.compare.study import AblationStudy, CompareStudy, SweepStudy

        kinds: dict[str, tuple[type[Study[Any, Any]], str]] = {
            "compare": (CompareStudy, "compare/quickstart.yaml"),
            "ablate": (AblationStudy, "ablate/fusion.yaml"),
            "privacy sweep": (SweepStudy, "privacy/digits.yaml"),
        }
        study, example = kinds[command]
        return Kind(study, result_table, example)
    if command == "distill":
        from fedkd.studies.central.report import methods_table
        from fedkd.studies.central.study import DistillStudy

        return Kind(DistillStudy, methods_table, "distill/digits.yaml")
    raise ConfigError(f"study: expected one of {', '.join(STUDIES)}, got {command!r}")


def run_command(
    command: str,
    config: str | None,
    overrides: Sequence[str] | None,
    resume: Path | None,
    *,
    trust: bool,
    jobs: int,
) -> None:
    """Run a study, or what is left of it."""
    from fedkd.simulations.cli.progress import ProgressView
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.machine import check_machine
    from fedkd.studies.engine import StudyFolder, run_study

    kind = kind_named(command)
    config_class = kind.study.config_class
    if config is None:
        if resume is None:
            raise ConfigError(f"give a config file, e.g. fedkd {command} configs/{kind.example}")
        if overrides:
            raise ConfigError(f"{overrides[0]}: --resume goes on with the folder's own config")
        folder = StudyFolder.open(resume, config_class, trust=trust)
        folder.import_plugins()
        study = kind.study(folder.config)
    else:
        study = kind.study(load(config_class, config, overrides or [], command))
        study.check()  # what is missing or does not fit is found before a folder exists
        for cell in study.cells:
            if isinstance(cell.experiment, Experiment):
                check_machine(cell.experiment, workers=False)
        if resume is None:
            folder = StudyFolder.new(study.config)
        else:
            folder = StudyFolder.open(resume, config_class, study.config)
    console = screen()
    trusted = " --trust" if folder.config.plugins else ""
    go_on = f"go on with: fedkd {command} --resume {folder.path}{trusted}"
    with (
        interruptible(go_on),
        folder.lock,
        ProgressView(console, f"study   {folder.path}") as notify,
        ExitStack() as stack,
    ):
        tasks = None
        if jobs > 1:
            from fedkd.simulations.jobs import beside

            tasks = stack.enter_context(beside(study, folder.path, jobs, notify))
        results = run_study(study, folder, notify, tasks)
    show_results(console, folder.path, kind, results)
    if not results["finished"]:
        failed = len(results["errors"])
        print(f"{failed} of {len(study.cells)} failed; {go_on}", file=sys.stderr)
        sys.exit(FAILED)


def report_again(path: Path, command: str, *, trust: bool) -> None:
    """Write results and page of a study's folder again; print its table."""
    from fedkd.simulations.cli.screen import screen
    from fedkd.studies.engine import StudyFolder, present

    kind = kind_named(command)
    folder = StudyFolder.open(path, kind.study.config_class, trust=trust)
    show_results(screen(), folder.path, kind, present(kind.study(folder.config), folder))


def show_results(console: Console, folder: Path, kind: Kind, results: Record) -> None:
    """The end of a study's command: its table, what failed, where it is and where its page is."""
    from fedkd.simulations.cli.tables import console_table
    from fedkd.studies.engine import REPORT

    console.print(console_table(kind.table(results)))
    if results.get("promises"):
        console.print(results["promises"], highlight=False)
    for label, error in results["errors"].items():
        console.print(f"failed  {label}: {error}", soft_wrap=True, highlight=False, markup=False)
    show(console, "folder", folder)
    show(console, "report", folder / REPORT)
