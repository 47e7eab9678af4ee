"""The main job: Flower's simulation runtime with its Ray backend, driven from Python.

`run_simulation` is the only way to reach the actor option that cures Flower's pool of dead
actors: with `max_restarts=-1` Ray revives a killed actor, so putting it back is right.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.clientapp import ClientApp

from fedkd.build import check
from fedkd.config import Experiment
from fedkd.rounds import Notify, silent, workspace, workspace_of
from fedkd.rundir import RunDirectory
from simulations.client_app import make_client_app
from simulations.server_app import make_server_app

# Nothing is sent anywhere, installed or downloaded at run time.
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


def run_ray(
    experiment: Experiment,
    *,
    run: RunDirectory | None = None,
    notify: Notify = silent,
    client_app: ClientApp | None = None,
    nodes: int | None = None,
) -> RunDirectory:
    """Run an experiment on Flower's simulation runtime and return its run directory.

    Args:
        experiment: What to run; `resources` says how many clients work at once.
        run: An earlier run to go on with; default: a new one.
        notify: Hears of progress, from the server's thread.
        client_app: Another client app (fault injection).
        nodes: Size of the federation; default: the experiment's number of clients.

    Raises:
        ConfigError: the experiment cannot be run.
        RuntimeError: the runtime failed; the run can be resumed.
    """
    os.environ.update(OFFLINE)
    check(experiment)
    space = workspace(experiment.to_json()) if run is None else workspace_of(run, experiment)
    run = run or RunDirectory.new(experiment)
    resources = experiment.resources
    with _flower_logs_to(run), _ray_stopped_at_the_end():
        from flwr.simulation import run_simulation

        run_simulation(
            server_app=make_server_app(run, space, notify),
            client_app=client_app or make_client_app(),
            num_supernodes=nodes or experiment.clients,
            backend_config={
                "client_resources": {
                    "num_cpus": resources.client_cpus,
                    "num_gpus": resources.client_gpus,
                    "max_restarts": -1,
                },
                "init_args": {
                    "log_to_driver": False,
                    "logging_level": "ERROR",
                    # A stale cluster file of another Ray must not be joined by accident.
                    "address": "local",
                },
            },
        )
    return run


@contextmanager
def _flower_logs_to(run: RunDirectory) -> Iterator[None]:
    """Send Flower's, Ray's and our own log records to the run's log file for a while."""
    handler = logging.FileHandler(run.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "ray", "fedkd", "strategies")]
    before = [(log.handlers[:], log.propagate, log.level) for log in loggers]
    for log in loggers:
        log.handlers, log.propagate = [handler], False
        log.setLevel(min(log.level or logging.INFO, logging.INFO))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(level)
        handler.close()


@contextmanager
def _ray_stopped_at_the_end() -> Iterator[None]:
    """Leave no process behind, also when the run fails or is interrupted."""
    import ray

    mine = not ray.is_initialized()
    try:
        yield
    finally:
        if mine and ray.is_initialized():
            ray.shutdown()
