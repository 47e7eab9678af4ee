"""`fedkd audit`: does the promise hold in practice?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.arguments import RunPath, Trust
from fedkd.simulations.cli.configs import open_run
from fedkd.simulations.cli.ending import interruptible, show, typed
from fedkd.simulations.failures import FAILED


def audit(
    path: RunPath,
    client: Annotated[
        int | None, typer.Option(help="whose teacher is trained again; default: most images")
    ] = None,
    shadows: Annotated[int, typer.Option(help="shadow models, an even number; 0: none")] = 8,
    canaries: Annotated[int, typer.Option(help="for the bound on epsilon; 0: none")] = 200,
    epsilon: Annotated[
        float | None, typer.Option(help="what if this were promised? for runs without a promise")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="of the claim and the bound; default: the run's promise, else 1e-5"),
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="what if teachers were trained with DP-SGD and this noise? likewise"),
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="with --noise-multiplier: the clipping norm  [default: 1]")
    ] = None,
    nominal_size: Annotated[
        int | None,
        typer.Option(help="with --noise-multiplier: size of a shard; default: the client's"),
    ] = None,
    draw: Annotated[
        int, typer.Option(min=0, help="which draw of canaries and coins; another tests anew")
    ] = 0,
    mechanism: Annotated[
        bool, typer.Option("--mechanism", help="test the private training itself, not the run")
    ] = False,
    trainings: Annotated[
        int | None,
        typer.Option(help="with --mechanism: tiny trainings of each kind  [default: 1000]"),
    ] = None,
    trust: Trust = False,
) -> None:
    """Attack a finished run: who was trained on, and how large must epsilon be at least?"""
    from fedkd.privacy.dp_sgd import Mechanism
    from fedkd.rounds import context_of_run
    from fedkd.simulations.cli.progress import ProgressView
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.cli.tables import console_table
    from fedkd.studies.audit.mechanism import audit_mechanism
    from fedkd.studies.audit.noisy_steps import TRAININGS
    from fedkd.studies.audit.promise import Claim
    from fedkd.studies.audit.report import attacks_table, mechanism_table, sentence, write
    from fedkd.studies.audit.study import Options, audit_run, chosen, keep

    if trainings is not None and not mechanism:
        raise ConfigError("--trainings: is of the audit of the mechanism, and needs --mechanism")
    if mechanism and epsilon is not None:
        raise ConfigError("--epsilon: what a mechanism claims follows from its noise; leave it out")
    run = open_run(path, trust=trust)
    what_if = {
        "--epsilon": epsilon,
        "--delta": delta,
        "--noise-multiplier": noise_multiplier,
        "--max-grad-norm": max_grad_norm,
        "--nominal-size": nominal_size,
    }
    given = [name for name, value in what_if.items() if value is not None]
    if given and run.experiment.promises:
        raise ConfigError(
            f"{given[0]}: this run promises privacy itself, in its config, and that is what is "
            "audited; leave the option out"
        )
    if noise_multiplier is None and (max_grad_norm or nominal_size):
        raise ConfigError(f"{given[-1]}: is of DP-SGD, and needs --noise-multiplier")
    delta = 1e-5 if delta is None else delta
    if epsilon is not None and epsilon <= 0:
        raise ConfigError(f"--epsilon: expected more than 0, got {epsilon}")
    if not 0 < delta < 1:
        raise ConfigError(f"--delta: expected more than 0 and less than 1, got {delta}")
    options = Options(client=client, shadows=shadows, canaries=canaries, delta=delta, draw=draw)
    space = context_of_run(run)
    client = chosen(space, options)
    as_if = None
    if noise_multiplier is not None:
        teachers = run.experiment.teachers
        size = nominal_size or len(space.data.shard_rows[client])
        try:
            as_if = Mechanism.of(
                size,
                teachers.batch_size,
                teachers.epochs,
                noise_multiplier,
                max_grad_norm=1.0 if max_grad_norm is None else max_grad_norm,
            )
        except ValueError as error:
            raise ConfigError(f"--{str(error).replace('_', '-', 2)}") from None
    claim = None if epsilon is None else Claim(epsilon, delta)
    console = screen()
    with interruptible("nothing was written"), ProgressView(console, f"audit   {run.path}") as view:
        if mechanism:
            found = audit_mechanism(
                run,
                space,
                client,
                mechanism=as_if,
                delta=delta,
                trainings=TRAININGS if trainings is None else trainings,
                notify=view,
            )
            facts = keep(run, {"mechanism": found})
            shown, refuted = mechanism_table(found), found["verdict"] == "refuted"
        else:
            facts = audit_run(run, space, options, mechanism=as_if, claim=claim, notify=view)
            shown, refuted = attacks_table(facts), facts["verdict"] == "refuted"
    page = write({**facts, "command": typed(path)}, run.path)
    console.print(console_table(shown))
    console.print(sentence(facts), highlight=False)
    show(console, "report", page)
    if refuted:
        sys.exit(FAILED)
