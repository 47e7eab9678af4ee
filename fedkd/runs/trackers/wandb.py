"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedkd.io.extras import extra
from fedkd.runs.trackers import TRACKERS
from fedkd.runs.trackers.base import Axis, Tracked, Tracker

Mode = Literal["online", "offline"]


def _library() -> Any:
    with extra("wandb", "tracker 'wandb'"):
        import wandb
    return wandb


@TRACKERS.register("wandb")
class WeightsAndBiases(Tracker):
    """A run of W&B, with the page as an artifact; offline it is kept in `wandb/` for later.

    That folder is below WANDB_DIR, else the working directory, and not in the run's, since W&B puts
    links in it; `wandb sync wandb/offline-run-*` sends it. Of the machine nothing is sent: no code,
    no git, no console, no meters.

    Args:
        project: Where the run appears.
        entity: Whose project; default: that of your login.
        mode: `online` or `offline`; default: WANDB_MODE, else online.
    """

    def __init__(
        self,
        run: Tracked,
        *,
        project: str = "fedkd",
        entity: str | None = None,
        mode: Mode | None = None,
    ) -> None:
        self._wandb = _library()
        mode = mode or os.environ.get("WANDB_MODE") or "online"  # type: ignore[assignment]
        if (
            mode == "online" and not self._wandb.api.api_key
        ):  # else it asks, and waits for an answer
            raise RuntimeError("not logged in: wandb login, or set mode: offline")
        quiet = self._wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True,
            x_disable_stats=True, x_disable_meta=True, x_save_requirements=False,
        )  # fmt: skip
        self._run = self._wandb.init(
            project=project,
            entity=entity,
            mode=mode,
            id=run.identity,
            name=run.identity,
            group=run.name,
            resume="allow",
            config=dict(run.parameters),
            settings=quiet,
            reinit="create_new",
        )
        for axis in ("round", "epoch"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="round")
        self._run.define_metric("epoch/*", step_metric="epoch")

    @classmethod
    def check(cls) -> None:
        """Raise `MissingExtra` where wandb is not installed."""
        _library()

    def log(self, axis: Axis, step: int, scalars: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({axis: step, **scalars})

    def finish(self, final: Mapping[str, float], files: Sequence[Path]) -> None:
        """The run's summary, and its files as one artifact."""
        self._run.summary.update(dict(final))
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
        for path in files:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, *, complete: bool) -> None:
        """Write out, or upload, what is left."""
        self._run.finish(exit_code=0 if complete else 1)
