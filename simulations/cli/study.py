"""What the commands of all studies share: resume, progress, table, paths and exit codes.

How a command ends (`simulations.failures` has the codes): interrupted work says how to go on and
is 130; a study of which a cell failed is shown as far as it came, and is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkd.config import ConfigError, Experiment
from simulations.cli.configs import load
from simulations.failures import FAILED, INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from fedkd.studies.engine import Record, Study

Resume = Annotated[
    Path | None,
    typer.Option(help="go on in this folder; with a config beside it, only what it changes is run"),
]


@contextmanager
def interruptible(go_on: str) -> Iterator[None]:
    """End the command in good order once the user wants it to: what to do next, and 130."""
    from fedkd.rounds import Interrupted

    try:
        yield
    except Interrupted:
        print(f"interrupted; {go_on}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def show(console: Console, name: str, path: Path) -> None:
    """A line with a path, which is never broken."""
    console.print(f"{name:<8}{path}", soft_wrap=True, highlight=False, markup=False)


def run_command(
    kind: type[Study[Any, Any]],
    config: str | None,
    overrides: Sequence[str] | None,
    resume: Path | None,
    *,
    trust: bool,
    example: str,
    view: Callable[[Console, str], AbstractContextManager[Any]],
    table: Callable[[Record], Any],
) -> None:
    """Run a study, or what is left of it.

    Args:
        kind: Of study.
        config: Its file; None: that of the folder.
        overrides: `key=value` words.
        resume: The folder to go on in.
        trust: Import the plugins that the folder names.
        example: A config, for messages.
        view: Shows progress, under a title.
        table: What the console shows at the end.
    """
    from fedkd.studies.engine import StudyFolder, run_study
    from simulations.cli.screen import screen
    from simulations.machine import check_machine

    command = kind.config_class.model_fields["study"].default
    if config is None:
        if resume is None:
            raise ConfigError(f"give a config file, e.g. fedkd {command} configs/{example}")
        if overrides:
            raise ConfigError(f"{overrides[0]}: --resume goes on with the folder's own config")
        folder = StudyFolder.open(resume, kind.config_class, trust=trust)
        folder.import_plugins()
        study = kind(folder.config)
    else:
        study = kind(load(kind.config_class, config, overrides or [], command))
        study.check()  # what is missing or does not fit is found before a folder exists
        for cell in study.cells:
            if isinstance(cell.experiment, Experiment):
                check_machine(cell.experiment, workers=False)
        if resume is None:
            folder = StudyFolder.new(study.config)
        else:
            folder = StudyFolder.open(resume, kind.config_class, study.config)
    console = screen()
    trusted = " --trust" if folder.config.plugins else ""
    go_on = f"go on with: fedkd {command} --resume {folder.path}{trusted}"
    with interruptible(go_on), folder.lock, view(console, f"study   {folder.path}") as notify:
        results = run_study(study, folder, notify)
    show_results(console, folder.path, table(results))
    if not results["finished"]:
        failed = len(results["errors"])
        print(f"{failed} of {len(study.cells)} failed; {go_on}", file=sys.stderr)
        sys.exit(FAILED)


def show_results(console: Console, folder: Path, table: Any) -> None:
    """The end of a study's command: its table, where it is and where its page is."""
    from fedkd.studies.engine import REPORT
    from simulations.cli.tables import console_table

    console.print(console_table(table))
    show(console, "folder", folder)
    show(console, "report", folder / REPORT)
