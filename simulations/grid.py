"""The rounds within a ServerApp of your own."""

from __future__ import annotations

from functools import partial

from fedkd.io.extras import extra

with extra("simulation", "fedkd.simulations.grid"):
    from flwr.serverapp import Grid

from fedkd.config import Experiment
from fedkd.rounds import Notify, silent
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.job import begun, run_job
from fedkd.simulations.ray import workers


def run_grid(
    experiment: Experiment,
    grid: Grid,
    *,
    run: RunDirectory | None = None,
    notify: Notify = silent,
    simulated: bool = True,
) -> RunDirectory:
    """Run an experiment with the nodes of a grid and return its run directory.

    Args:
        experiment: What to run; it has as many clients as the grid has nodes.
        grid: Flower's way to the nodes; their ClientApp is `make_client_app()`, or had
            `add_client`.
        run: An earlier run to go on with; default: a new one.
        notify: Hears of progress.
        simulated: Clients share this machine's disk and keep their teachers in the run's folder;
            False: each node has its own (`state-dir`, `policy`).

    Raises:
        ConfigError: the experiment cannot be run, or not with so many nodes.
    """
    run, context = begun(experiment, run, workers=None)
    free = partial(workers, experiment)
    run_job(grid, run, context, notify=notify, simulated=simulated, workers=free)
    return run
