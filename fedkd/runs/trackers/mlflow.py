"""MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedkd.io.extras import extra
from fedkd.runs.trackers import TRACKERS
from fedkd.runs.trackers.base import Axis, Tracked, Tracker

_AT_ONCE, _LONGEST = 100, 500  # what every version of its server takes: parameters, their length


def _library() -> Any:
    with extra("mlflow", "tracker 'mlflow'"):
        import mlflow
    return mlflow


@TRACKERS.register("mlflow")
class MLflow(Tracker):
    """A run of MLflow, in its local store or on a server.

    Args:
        uri: `sqlite:///mlflow.db`, a server, a folder; default: MLFLOW_TRACKING_URI, or MLflow's
            own. It stands in the config, so credentials do not belong there: MLflow takes them from
            MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
        experiment: Which the run belongs to; default: the config's name.
    """

    def __init__(
        self, run: Tracked, *, uri: str | None = None, experiment: str | None = None
    ) -> None:
        mlflow = _library()
        if uri is not None and urlsplit(uri).password:
            raise ValueError(
                "uri: credentials do not belong in a config: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        from mlflow import entities

        self._entities = entities
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if run.handle is not None:
            self.handle = run.handle
            self._client.update_run(run.handle, status="RUNNING")
            return
        name = experiment or run.name
        known = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if known is None else known.experiment_id
        self.handle = self._client.create_run(number, run_name=run.identity).info.run_id
        values = [
            entities.Param(key, str(value)[:_LONGEST]) for key, value in run.parameters.items()
        ]
        for start in range(0, len(values), _AT_ONCE):
            self._client.log_batch(self.handle, params=values[start : start + _AT_ONCE])

    @classmethod
    def check(cls) -> None:
        """Raise `MissingExtra` where mlflow is not installed."""
        _library()

    def log(self, axis: Axis, step: int, scalars: Mapping[str, float]) -> None:
        """One point of each curve."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, v, now, step) for name, v in scalars.items()]
        self._client.log_batch(self.handle, metrics=metrics)

    def finish(self, final: Mapping[str, float], files: Sequence[Path]) -> None:
        """Final numbers, and files as artifacts."""
        self.log("round", 0, final)
        for path in files:
            self._client.log_artifact(self.handle, str(path))

    def close(self, *, complete: bool) -> None:
        """Mark it as finished, or killed."""
        self._client.set_terminated(self.handle, status="FINISHED" if complete else "KILLED")
