"""`fedkd privacy`: what a budget buys, and what a config is going to spend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.arguments import Config, Overrides, Trust, a_study, keys
from fedkd.simulations.cli.configs import load
from fedkd.simulations.cli.study import Jobs, Resume, run_command

if TYPE_CHECKING:
    from rich.console import Console

    from fedkd.rounds.outlook import Outlook

app = typer.Typer(no_args_is_help=True, help="Budgets: plan one, sweep over several.")


@app.command()
def sweep(
    config: Annotated[str | None, a_study("privacy/digits.yaml")] = None,
    overrides: Annotated[list[str] | None, keys("seeds=[0,1] experiment.rounds=2")] = None,
    epsilon: Annotated[
        str | None, typer.Option(help="budgets instead of the config's, e.g. inf,10,5,2,1")
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
    jobs: Jobs = 1,
) -> None:
    """Utility against epsilon: mechanisms, budgets and seeds in one table and picture."""
    words = list(overrides or [])
    if epsilon is not None:
        words.append(f"epsilons=[{epsilon}]")
    run_command("privacy sweep", config, words, resume, trust=trust, jobs=jobs)


@app.command("plan")
def plan_(config: Config, overrides: Overrides = None) -> None:
    """What a private config, or a sweep, costs and how much noise it adds, before it is run."""
    from rich.table import Table

    from fedkd.config import Experiment, read_config
    from fedkd.rounds.outlook import outlook
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.compare.study import SweepStudy
    from fedkd.simulations.compare.sweep import Sweep

    console, words = screen(), overrides or []
    if read_config(config).get("study") == "privacy sweep":
        swept = load(Sweep, config, words, "privacy plan")
        found = swept.outlooks()
        _show(console, swept.name, found)
        if promises := SweepStudy(swept).promises:
            console.print(promises, highlight=False)
        return
    experiment = load(Experiment, config, words, "privacy plan")
    ahead = outlook(experiment)
    if ahead is None:
        raise ConfigError(
            "teachers.privacy: this config trains its teachers without DP-SGD, and releases "
            "nothing under noise; there is nothing to plan (try teachers.privacy='{epsilon: 5, "
            "nominal_size: 500}', or release='{name: gnmax, epsilon: 5, cells: auto}')"
        )
    table = Table(title=f"{experiment.name}: what one client spends", title_justify="left")
    for title in (ahead.each, "epsilon", "of the budget"):
        table.add_column(title, justify="right")
    whole = ahead.spent(ahead.rounds)
    for number in range(1, ahead.rounds + 1):
        spent = ahead.spent(number)
        table.add_row(str(number), f"{spent:.3f}", f"{spent / whole:.0%}")
    console.print(table)
    _show(console, "a round", {experiment.name: ahead})


@app.command()
def propose(
    size: Annotated[int, typer.Argument(help="public size of a client's shard", min=1)],
    epsilon: Annotated[float, typer.Argument(help="promise for the whole run")],
    delta: Annotated[float | None, typer.Option(help="default: at most 0.1 / SIZE")] = None,
) -> None:
    """Teachers for small private shards: model, batch, steps and clipping, as lines of a config."""
    from fedkd.privacy.plan import Proposal

    if not epsilon > 0:
        raise ConfigError(f"EPSILON: expected more than 0, got {epsilon:g}")
    print("teachers:")
    for key, value in Proposal.of(size, epsilon, delta).teachers.items():
        print(f"  {key}: {json.dumps(value)}")


def _show(console: Console, title: str, rows: Mapping[str, Outlook]) -> None:
    """Noise beside what it is to leave readable."""
    from rich.table import Table

    table = Table(title=f"{title}: noise and signal", title_justify="left")
    table.add_column("run")
    table.add_column("a round asks")
    for column in ("epsilon", "delta", "noise", "of", "noise / signal"):
        table.add_column(column, justify="right")
    for name, one in rows.items():
        table.add_row(
            name,
            one.asked,
            f"{one.spent(one.rounds):.3g}",
            f"{one.delta:.0e}",
            f"{one.noise:.3g}",
            f"{one.signal:g}",
            f"{one.ratio:.1%}",
        )
    console.print(table)
