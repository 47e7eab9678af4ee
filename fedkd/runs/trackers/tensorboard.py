"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkd.io.extras import extra
from fedkd.runs.trackers import TRACKERS
from fedkd.runs.trackers.base import Axis, Tracked, Tracker


def _writer() -> Any:
    with extra("tensorboard", "tracker 'tensorboard'"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows all runs.

    Epochs are in a folder of their own, since they count in other steps than rounds.
    """

    def __init__(self, run: Tracked) -> None:
        writer = _writer()
        folder = run.folder / "tensorboard"
        # What was logged after the last checkpoint is passed over by whoever reads the files.
        folders: dict[Axis, Path] = {"round": folder, "epoch": folder / "epochs"}
        self._writers = {
            axis: writer(str(path), purge_step=run.steps[axis] + 1)
            for axis, path in folders.items()
        }
        self._run = run

    @classmethod
    def check(cls) -> None:
        """Raise `MissingExtra` where tensorboard is not installed."""
        _writer()

    def log(self, axis: Axis, step: int, scalars: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in scalars.items():
            self._writers[axis].add_scalar(name, value, step)
        self._writers[axis].flush()

    def finish(self, final: Mapping[str, float], files: Sequence[Path]) -> None:
        """Hyperparameters beside the final numbers; texts, since files cannot be kept."""
        rounds = self._writers["round"]
        rounds.add_hparams(dict(self._run.parameters), dict(final), run_name=".")
        for path in files:
            text = f"    {path.read_text(encoding='utf-8')}".replace("\n", "\n    ")
            shown = f"`{self._run.identity}/{path.name}`" if path.suffix == ".html" else text
            rounds.add_text(path.name, shown)

    def close(self, *, complete: bool) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
