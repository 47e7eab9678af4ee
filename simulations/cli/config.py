"""`fedkd config`: look at configs."""

from __future__ import annotations

import sys
from itertools import takewhile
from pathlib import Path

import typer
from rich.text import Text

from fedkd import configs
from fedkd.config import Experiment, read_config
from fedkd.simulations.cli.arguments import Config, Overrides
from fedkd.simulations.cli.configs import load
from fedkd.simulations.cli.screen import screen

app = typer.Typer(help="Look at configs.", no_args_is_help=True)


@app.command("show")
def show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config, every default written out."""
    from fedkd.build import check

    experiment = load(Experiment, config, overrides or [], "config show")
    check(experiment)
    sys.stdout.write(experiment.to_yaml())


@app.command("list")
def list_configs() -> None:
    """List the ready configs, each with the command that takes it; it works from any folder."""
    folder = Path(configs.__file__).parent
    for file in sorted(folder.rglob("*.yaml")):
        if file.name.startswith("_"):  # a part of others
            continue
        path = f"configs/{file.relative_to(folder).as_posix()}"
        command = read_config(path).get("study", "run")
        screen().print(Text(f"fedkd {command} {path}", style="bold"), soft_wrap=True)
        screen().print(Text(f"    {_about(file)}", style="dim"), soft_wrap=True)


def _about(file: Path) -> str:
    """The first sentence of the comment that a config begins with."""
    lines = file.read_text("utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comment).split(". ")[0].rstrip(".:")
