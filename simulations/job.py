"""The whole job on the server's side, whoever moves the messages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flwr.serverapp import Grid

from fedkd.build import mirrored
from fedkd.config import Experiment
from fedkd.data.splits import overlaps
from fedkd.reporting.run_page import write_report
from fedkd.rounds import ExperimentContext, Notify, Server, computing, silent
from fedkd.rounds.context import context_of_run, experiment_context
from fedkd.rounds.server_teachers import server_teachers_of
from fedkd.rounds.summary import summarise
from fedkd.runs.directory import RunDirectory, Session
from fedkd.runs.results import Summary
from fedkd.runs.tracking import check_trackers, tracked
from fedkd.simulations.machine import check_machine
from fedkd.strategies.messaging import WINDOW
from fedkd.strategies.nodes import Keys
from fedkd.strategies.strategy import FederatedDistillation


def begun(
    experiment: Experiment,
    run: RunDirectory | None,
    *,
    workers: bool | None,
    output: str | None = None,
) -> tuple[RunDirectory, ExperimentContext]:
    """The run to go on with or else a new one, and what its config means; all is checked first.

    Args:
        experiment: What to run.
        run: An earlier run.
        workers: As `check_machine`; None where clients compute on machines of which nothing is
            known here.
        output: Where a new run is made; None: as the config says.
    """
    if run is not None:
        run.import_plugins()
        run.check_config()
    if workers is None:
        check_trackers(experiment.track)
    else:
        check_machine(experiment, workers=workers)
    context = experiment_context(experiment) if run is None else context_of_run(run, experiment)
    server_teachers_of(context)  # what does not fit is found before there is a folder
    return run or RunDirectory.new(experiment, output), context


def players_of(experiment: Experiment) -> int | None:
    """How many nodes play the clients of a simulation; None: each client is a node.

    No more messages than these are ever under way, so more nodes would only be names: Flower keeps
    a context for each and looks through all of them ten times a second.
    """
    return WINDOW if experiment.clients > WINDOW else None


def run_job(
    grid: Grid,
    run: RunDirectory,
    context: ExperimentContext,
    *,
    notify: Notify = silent,
    simulated: bool = True,
    keys: Keys | None = None,
    workers: Callable[[], int] = lambda: 1,
    players: int | None = None,
) -> Summary:
    """Rounds, baselines, summary and report of one run.

    Args:
        grid: Flower's way to the nodes.
        run: Where everything is written; a run with checkpoints goes on from the last one.
        context: What the config means on this machine.
        notify: Hears of progress.
        simulated: Clients share this machine's disk and keep their teachers in the run's folder.
        keys: Whose key makes a node which client (deployment); None: a node's word is taken.
        workers: How many clients, or groups of them, a simulation works on at once.
        players: How many nodes play the clients of a large simulation, as `players_of` says.

    Returns:
        The summary, as in summary.json.
    """

    def hear(event: str, **facts: Any) -> None:
        session.note()
        notify(event, **facts)

    run.check_config()
    if simulated:
        run.clients.mkdir(exist_ok=True)
    with (
        Session(run) as session,
        ExitStack() as stack,
        computing(run.experiment.resources, run.experiment.resources.server_threads),
    ):
        server = Server(context, run, hear)
        run.rewind(server.round)
        # Some public data sets repeat images; reported once.
        doubles = {pair: count for pair, count in overlaps(context.data).items() if count}
        if doubles:
            server.warn(f"identical images in two splits: {doubles}")
        for text in (*mirrored(run.experiment), *context.remarks):
            server.warn(text)
        finish = stack.enter_context(tracked(run, server.warn, server.round))
        state = str(run.clients) if simulated else None
        FederatedDistillation(
            grid, server, state_dir=state, keys=keys, workers=workers, players=players
        ).run()
        server.keep()
        here = simulated and run.experiment.resources.ray_address is None
        summary = summarise(server, seconds=session.total, clients_here=here)
        run.write_json("summary.json", summary)
        notify("phase", round=None, phase="report")
        write_report(run, context.data)
        finish(summary)
    notify("done", path=str(run.path))
    return summary
