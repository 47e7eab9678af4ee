"""A trained student, wherever it lies."""

from __future__ import annotations

from pathlib import Path

from fedkd.config import ConfigError
from fedkd.runs.directory import RunDirectory
from fedkd.runs.export import Trained
from fedkd.runs.hub import WEIGHTS


def load_student(path: str | Path | RunDirectory, *, trust: bool = False) -> Trained:
    """The student of a run or an export, ready for use: no data set is needed.

    Args:
        path: A run's folder, or what `fedkd export` wrote: an `.onnx` or `.pt2` file, or a folder
            with `model.safetensors`.
        trust: Whether plugins that a run's config names may be imported.

    Raises:
        ConfigError: there is no student, or a file is damaged.
    """
    if isinstance(path, RunDirectory):
        return Trained.of(path)
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix in (".onnx", ".pt2"):
            return Trained.of_file(place)
        raise ConfigError(
            f"{place}: expected a run's folder, an .onnx or .pt2 file, or a folder with {WEIGHTS}"
        )
    if (place / WEIGHTS).is_file():
        return Trained.of_folder(place)
    return Trained.of(RunDirectory.open(place, trust=trust))
