"""The `fedkd` command: a thin layer over the Python API."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import click
import typer

import fedkd
from fedkd import __version__
from fedkd.io.text import PlainFormatter
from fedkd.simulations.cli import config, data, deploy, listing, privacy
from fedkd.simulations.cli.audit import audit
from fedkd.simulations.cli.contribution import contribution
from fedkd.simulations.cli.init import init
from fedkd.simulations.cli.inspection import inspect
from fedkd.simulations.cli.merge import merge
from fedkd.simulations.cli.partition import partition
from fedkd.simulations.cli.quarantine import quarantine
from fedkd.simulations.cli.report import report
from fedkd.simulations.cli.run import run
from fedkd.simulations.cli.status import status
from fedkd.simulations.cli.students import export, predict
from fedkd.simulations.cli.studies import ablate, attack, compare, distill
from fedkd.simulations.cli.unlearn import unlearn
from fedkd.simulations.cli.usage import explain, run_app
from fedkd.simulations.cli.view import view
from fedkd.simulations.failures import INTERRUPTED, OUTPUT_GONE, USER_ERROR, failure_of, one_line

app = typer.Typer(
    help="Distil many private teachers into one small student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, commands in {
    "Run": (init, run, status, report, view, predict, export),
    "Compare": (distill, compare, ablate, attack, merge),
    "Examine a run": (inspect, audit, contribution, unlearn, quarantine),
    "Look up": (partition, listing.show),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("list", rich_help_panel="Look up")(listing.list_things)
for name, group, panel in (
    ("config", config.app, "Look up"),
    ("data", data.app, "Look up"),
    ("privacy", privacy.app, "Privacy and deployment"),
    ("deploy", deploy.app, "Privacy and deployment"),
):
    app.add_typer(group, name=name, rich_help_panel=panel)


def _version(value: bool) -> None:
    if value:
        print(f"fedkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Distil many private teachers into one small student."""


def main() -> None:
    """Entry point: whatever goes wrong is one line and an exit code, never a traceback."""
    _for_any_terminal()
    if logging.lastResort is not None:  # where warnings of the library are shown
        logging.lastResort.setFormatter(PlainFormatter())
    words = sys.argv[1:]
    _place_working_directory(words)
    try:
        code = run_app(typer.main.get_command(app), words)
        sys.stdout.flush()
    except click.ClickException as error:
        code = _fail(one_line(explain(error, words)), USER_ERROR)
    except Exception as error:
        failure = failure_of(error)
        code = _fail(failure.text, failure.code)
    except KeyboardInterrupt:
        code = _fail("interrupted", INTERRUPTED)
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):  # rich ends with 1 on its own
            raise
        code = OUTPUT_GONE
    _leave(code)


def _fail(text: str, code: int) -> int:
    try:
        if text:
            print(f"fedkd: {text}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads: the code has to do
        pass
    return code


def _for_any_terminal() -> None:
    """A sign that the terminal's encoding lacks becomes a `?`, not an error; nor is `>&-` one."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # opened in this order, they get the numbers that are free: 1 and 2
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


# What looks at a folder that may be somebody else's, often from within it.
_LOOKS = frozenset(
    [
        "audit",
        "contribution",
        "export",
        "inspect",
        "merge",
        "predict",
        "quarantine",
        "report",
        "status",
        "unlearn",
        "view",
    ]
)


def _place_working_directory(words: Sequence[str]) -> None:
    """The working directory is where `plugins:` live; it must not hide any other module.

    Python puts it first for `python -m`. Commands that look at a folder, or go on with it, import
    nothing from there unless they are given `--trust`.
    """
    here, root = str(Path.cwd()), str(Path(fedkd.__file__).parents[1])
    if sys.path[0] in ("", here) and root != here:
        del sys.path[0]
    resumes = any(word.split("=")[0] == "--resume" for word in words)
    if (resumes or not _LOOKS.isdisjoint(words[:1])) and "--trust" not in words:
        return
    # Processes of Ray get this path. There an editable install is found after all its folders, so
    # ours comes before a folder `fedkd` of the user's.
    for folder in (root, here) if Path(here, "fedkd").exists() else (here,):
        if folder not in sys.path:
            sys.path.append(folder)


def _leave(code: int) -> NoReturn:
    """End the process, also where a thread of Flower's or Ray's would go on for ever."""
    deadline = time.monotonic() + 10
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logging.shutdown()
                os._exit(code)
    if code == OUTPUT_GONE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own last flush is silent
    sys.exit(code)


if __name__ == "__main__":
    main()
