"""`fedkd audit`: does the promise hold in practice?"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fedkd.config import ConfigError
from simulations.commands.arguments import RunPath


def audit(
    path: RunPath,
    client: Annotated[
        int | None, typer.Option(help="whose teacher is trained again; default: most images")
    ] = None,
    shadows: Annotated[int, typer.Option(help="shadow models, an even number; 0: none")] = 8,
    canaries: Annotated[int, typer.Option(help="for the bound on epsilon; 0: none")] = 200,
    epsilon: Annotated[
        float | None, typer.Option(help="what the run promises its clients, if anything")
    ] = None,
    delta: Annotated[float, typer.Option(help="of the promise and the bound")] = 1e-5,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="train again with DP-SGD, in units of the clipping norm")
    ] = None,
    max_grad_norm: Annotated[float, typer.Option(help="with DP-SGD: the clipping norm")] = 1.0,
    nominal_size: Annotated[
        int | None, typer.Option(help="with DP-SGD: public size of a shard; default: the client's")
    ] = None,
) -> None:
    """Attack a finished run: who was trained on, and how large must epsilon be at least?"""
    from rich.console import Console

    from fedkd.audit.report import sentence, write
    from fedkd.audit.study import Claim, Options, audit_run, chosen
    from fedkd.rounds import workspace
    from fedkd.rundir import RunDirectory
    from fedkd.teachers.dp_sgd import Mechanism
    from simulations.live import Interrupted
    from simulations.steps import StepView

    if epsilon is not None and epsilon <= 0:
        raise ConfigError(f"--epsilon: expected more than 0, got {epsilon}")
    if not 0 < delta < 1:
        raise ConfigError(f"--delta: expected more than 0 and less than 1, got {delta}")
    run = RunDirectory.open(path)
    options = Options(client=client, shadows=shadows, canaries=canaries, delta=delta)
    space = workspace(run.experiment.to_json())
    mechanism = None
    if noise_multiplier is not None:
        teachers = run.experiment.teachers
        size = nominal_size or len(space.data.shard_rows[chosen(space, options)])
        try:
            mechanism = Mechanism.of(
                size,
                teachers.batch_size,
                teachers.epochs,
                noise_multiplier,
                max_grad_norm=max_grad_norm,
            )
        except ValueError as error:
            raise ConfigError(f"--{str(error).replace('_', '-', 2)}") from None
    claim = None if epsilon is None else Claim(epsilon, delta)
    console = Console()
    try:
        with StepView(console, f"audit   {run.path}") as view:
            facts = audit_run(run, space, options, mechanism=mechanism, claim=claim, notify=view)
    except Interrupted:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    page = write(facts, run.path)
    console.print(_table(facts))
    console.print(sentence(facts), highlight=False)
    console.print(f"report  {page}", soft_wrap=True, highlight=False)
    if facts["verdict"] == "refuted":
        sys.exit(1)


def _table(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="membership: members against others, 95 % intervals", title_justify="left")
    for name in ("target", "attack", "client"):
        table.add_column(name)
    for name in ("AUC", "interval", "TPR at 1 % FPR", "interval"):
        table.add_column(name, justify="right")
    for attack in facts["attacks"]:
        low, high = attack["auc_interval"]
        least, most = attack["tpr_interval"]
        table.add_row(
            attack["target"],
            attack["attack"],
            "all" if attack["client"] is None else str(attack["client"]),
            f"{attack['auc']:.3f}",
            f"{low:.2f} to {high:.2f}",
            f"{100 * attack['tpr']:.1f} %",
            f"{100 * least:.1f} to {100 * most:.1f}",
            style="bold" if attack["leaks"] else None,
        )
    return table
