"""`fedkd compare` and what it shares with `fedkd ablate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkd.config import ConfigError
from simulations.cli.arguments import TeacherWeights
from simulations.cli.configs import load

Resume = Annotated[
    Path | None,
    typer.Option(help="go on in this folder; with a config beside it, only what it changes is run"),
]

_EXAMPLES = {
    "compare": "compare/quickstart.yaml",
    "ablate": "ablate/fusion.yaml",
    "privacy sweep": "privacy/digits.yaml",
}


def compare(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/compare/quickstart.yaml")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. seeds=[0,1] only=[fedkd,fedavg]")
    ] = None,
    resume: Resume = None,
    trust: TeacherWeights = False,
) -> None:
    """Compare fedkd and baselines on one split: accuracy, bytes, calibration, several seeds."""
    from simulations.compare.config import Comparison

    side_by_side(Comparison, config, overrides or [], resume, "compare", trust=trust)


def side_by_side(
    sort: Any,
    config: str | None,
    overrides: list[str],
    resume: Path | None,
    command: str,
    *,
    trust: bool,
) -> None:
    """Run a comparison or an ablation, or what is left of it."""
    from fedkd.rounds import Interrupted
    from simulations.cli.screen import screen
    from simulations.compare.engine import prepare, run_all
    from simulations.compare.folder import CompareFolder
    from simulations.compare.table import result_table
    from simulations.compare.view import CompareView

    if config is None and resume is None:
        raise ConfigError(f"give a config file, e.g. fedkd {command} configs/{_EXAMPLES[command]}")
    given: Any = None if config is None else load(sort, config, overrides, command)
    if given is not None:
        prepare(given)  # what is missing or does not fit is said before a folder exists
    if resume is None:
        folder = CompareFolder.new(given)
    else:
        folder = CompareFolder.open(resume, given, trust=trust)
        folder.import_plugins()
        if not isinstance(folder.config, sort):
            raise ConfigError(f"{folder.path} is not of fedkd {command}")
    console = screen()
    go_on = f"fedkd {command} --resume {folder.path}{' --trust' * bool(folder.config.plugins)}"
    try:
        with folder.lock, CompareView(console) as view:
            found = run_all(folder, view)
    except Interrupted:
        print(f"interrupted; go on with: {go_on}", file=sys.stderr)
        sys.exit(130)
    console.print(result_table(found))
    console.print(f"folder  {folder.path}", soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"report  {folder.path / 'report.html'}", soft_wrap=True, highlight=False, markup=False
    )
    if not found["finished"]:
        sys.exit(1)


def report_again(path: Path, *, trust: bool) -> bool:
    """Write tables and report of a comparison or ablation; False if `path` is none."""
    from simulations.cli.screen import screen
    from simulations.compare.folder import CompareFolder

    if CompareFolder.sort_of(path) is None:
        return False
    from simulations.compare.engine import write_all
    from simulations.compare.table import result_table

    folder = CompareFolder.open(path, trust=trust)
    console = screen()
    console.print(result_table(write_all(folder)))
    console.print(
        f"report  {folder.path / 'report.html'}", soft_wrap=True, highlight=False, markup=False
    )
    return True
