"""The Flower ServerApp: finds the experiment, then hands over to `run_job`."""

from __future__ import annotations

import logging
import shlex
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd.config import load_experiment
from fedkd.io.text import PlainFormatter
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.deploy.identity import NodeKeys
from fedkd.simulations.job import begun, run_job
from fedkd.simulations.ray import workers

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`flwr run`: the run config names the YAML, the overrides and the output folder."""
    log = _log_to_stderr()
    settings = context.run_config
    run = None
    if settings.get("resume"):
        trust = settings.get("trust") is True
        run = RunDirectory.open(Path(str(settings["resume"])), trust=trust)
        experiment = run.experiment
    else:
        words = shlex.split(str(settings.get("overrides", "")))
        experiment = load_experiment(str(settings["config"]), words)
    # Public keys of the nodes, if this is a deployment: a node is the client whose key it holds.
    folder = str(settings.get("keys") or "")
    # Where clients may join later, so may their keys.
    expected = experiment.clients if experiment.federation.participation.start is None else 0
    keys = NodeKeys(Path(folder), expected) if folder else None
    output = str(settings.get("output") or "") or None
    run, space = begun(experiment, run, workers=None, output=output)
    log.info("run directory: %s", run.path)

    def notify(event: str, **facts: object) -> None:
        if event in ("round", "refused", "done", "phase"):
            shown = {k: v for k, v in facts.items() if not isinstance(v, dict | list)}
            log.info("%s %s", event, shown)

    # With keys the nodes are other machines: they keep their teachers in folders of their own, and
    # no word of theirs about workers is taken for Flower's.
    free = partial(workers, experiment)
    summary = run_job(
        grid, run, space, notify=notify, simulated=keys is None, keys=keys, workers=free
    )
    log.info("student %s, accuracy %.4f", summary["hash"], summary["student"]["accuracy"])


def _log_to_stderr() -> logging.Logger:
    """Flower ships this process's output to `flwr log`: what matters, and no more."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s fedkd: %(message)s"))
    for name in ("fedkd", "strategies"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    return logging.getLogger("fedkd")
