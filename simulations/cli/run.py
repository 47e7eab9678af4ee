"""`fedkd run`: an experiment from end to end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkd.config import ConfigError, Experiment
from fedkd.simulations.cli.arguments import Overrides, Trust
from fedkd.simulations.cli.configs import load, open_run
from fedkd.simulations.cli.ending import interruptible, show
from fedkd.simulations.cli.screen import screen
from fedkd.simulations.failures import noted

if TYPE_CHECKING:
    from fedkd.runs.directory import RunDirectory


def run(
    config: Annotated[str | None, typer.Argument(help="a YAML file")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run directory")] = None,
    runner: Annotated[
        str, typer.Option(help="ray (Flower's simulation runtime) or local (one process)")
    ] = "ray",
    trust: Trust = False,
) -> None:
    """Run an experiment: teachers, knowledge, fusion, student, report."""
    from fedkd.simulations.cli.tables import run_tables

    if runner not in ("ray", "local"):
        raise ConfigError(f"--runner: expected ray or local, got {runner!r}")
    if resume is None:
        directory = _begun(config, overrides or [], runner)
    elif config is not None:
        raise ConfigError("--resume takes its config from the run; give no config beside it")
    else:
        directory = _opened(resume, trust)
    trusted = " --trust" if directory.experiment.plugins else ""
    go_on = f"fedkd run --resume {directory.path}{trusted}"
    if resume is not None and _is_finished(directory):
        done = directory.read_json("summary.json").get("rounds", directory.experiment.rounds)
        print(f"finished already, after {done} rounds: nothing is left")
    else:
        with interruptible(f"go on with: {go_on}"), directory.lock, noted(directory.log, go_on):
            _run(directory, runner)
    console = screen()
    console.print(run_tables(directory))
    show(console, "run", directory.path)
    show(console, "report", directory.path / "report.html")


def _opened(path: Path, trust: bool) -> RunDirectory:
    from fedkd.runs.events import ClientsErased

    directory = open_run(path, trust=trust)
    directory.import_plugins()
    directory.check_config()
    if directory.events(ClientsErased):
        raise ConfigError(
            f"{directory.path}: clients were erased from this run, so it cannot go on; go on "
            "with the run that fedkd unlearn made in its place"
        )
    return directory


def _begun(config: str | None, overrides: Sequence[str], runner: str) -> RunDirectory:
    """A new run; what is missing or does not fit is found before its directory exists."""
    from fedkd.rounds import experiment_context
    from fedkd.runs.directory import RunDirectory
    from fedkd.simulations.machine import check_machine

    if config is None:
        raise ConfigError("give a config file, e.g. fedkd run configs/quickstart.yaml")
    experiment = load(Experiment, config, overrides, "run")
    check_machine(experiment, workers=runner == "ray")
    experiment_context(experiment)  # checks all, and is kept for the run itself
    if experiment.promises and experiment.settled:
        keys = ", ".join(experiment.settled)
        print(f"note: not given, so set to what the promise allows: {keys}", file=sys.stderr)
    return RunDirectory.new(experiment)


def _run(directory: RunDirectory, runner: str) -> None:
    from fedkd.simulations.cli.progress import ProgressView
    from fedkd.simulations.cli.screen import quiet_descriptors

    with quiet_descriptors(directory.log) as console, ProgressView(console) as view:
        if runner == "local":
            from fedkd.simulations.local import run_local

            run_local(directory.experiment, run=directory, notify=view)
        else:
            from fedkd.simulations.ray import run_ray

            run_ray(directory.experiment, run=directory, notify=view)


def _is_finished(directory: RunDirectory) -> bool:
    return directory.is_over and directory.read_json("summary.json") is not None
