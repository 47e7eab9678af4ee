"""`fedkd privacy`: what a budget buys, and what a config is going to spend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.arguments import Config, Overrides, Trust, a_study, keys
from fedkd.simulations.cli.configs import load
from fedkd.simulations.cli.study import Jobs, Resume, run_command

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
    """What a private config costs round by round, or each row of a sweep, before any training."""
    from rich.table import Table

    from fedkd.config import Experiment, read_config
    from fedkd.privacy.accounting import Steps
    from fedkd.privacy.accounting import epsilon as epsilon_of
    from fedkd.privacy.plan import plan
    from fedkd.simulations.cli.screen import screen

    if read_config(config).get("study") == "privacy sweep":
        _plan_sweep(config, overrides or [])
        return
    experiment = load(Experiment, config, overrides or [], "privacy plan")
    planned = plan(experiment)
    if planned is None:
        raise ConfigError(
            "teachers.privacy: this config trains its teachers without DP-SGD; there is nothing to "
            "plan (try teachers.privacy='{epsilon: 5, nominal_size: 500}')"
        )
    steps, mechanism = planned.steps, planned.mechanism
    privacy = experiment.teachers.privacy
    assert privacy is not None
    table = Table(title=f"{experiment.name}: what one client spends", title_justify="left")
    for title in ("round", "epsilon", "of the budget"):
        table.add_column(title, justify="right")
    for number in range(1, planned.rounds + 1):
        spent = epsilon_of(
            [Steps(steps.sample_rate, steps.noise_multiplier, number * steps.count)],
            planned.delta,
            privacy.accountant,
        )
        table.add_row(str(number), f"{spent:.3f}", f"{spent / planned.epsilon:.0%}")
    console = screen()
    console.print(table)
    console.print(
        f"delta {planned.delta:.0e} · noise multiplier {steps.noise_multiplier:.4g} · clipping "
        f"norm {mechanism.max_grad_norm:g} · {steps.count} steps a round, batches of "
        f"{mechanism.expected_batch_size:g} expected, rate {steps.sample_rate:.4g}",
        highlight=False,
    )


def _plan_sweep(config: str, overrides: Sequence[str]) -> None:
    """What each row of a sweep spends by DP-SGD."""
    from rich.table import Table

    from fedkd.config import Experiment
    from fedkd.privacy.plan import plan
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.cli.study import kind_named

    kind = kind_named("privacy sweep").study
    study = kind(load(kind.config_class, config, overrides, "privacy sweep"))
    table = Table(title=f"{study.config.name}: what one client spends", title_justify="left")
    table.add_column("row")
    for title in ("epsilon", "delta", "noise multiplier", "steps a round", "rounds"):
        table.add_column(title, justify="right")
    for cell in study.cells:
        if cell.seed != study.config.seeds[0]:
            continue
        assert isinstance(cell.experiment, Experiment)
        planned = plan(cell.experiment)
        if planned is None:
            continue
        table.add_row(
            cell.name,
            f"{planned.epsilon:g}",
            f"{planned.delta:.0e}",
            f"{planned.steps.noise_multiplier:.4g}",
            str(planned.steps.count),
            str(planned.rounds),
        )
    screen().print(table)
    screen().print("Rows without DP-SGD promise nothing, or by a release.", highlight=False)
