"""Configs as commands take them: each command has its kind, and a file of another kind is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedkd.config import ConfigError, Experiment, Section, load_config

if TYPE_CHECKING:
    from fedkd.runs.directory import RunDirectory

Root = TypeVar("Root", bound=Section)


def load(root: type[Root], path: str | Path, overrides: Sequence[str], command: str) -> Root:
    """A command's config.

    Args:
        root: The kind of config that the command takes.
        path: A YAML file.
        overrides: `key=value` words; a key twice is refused, as in YAML.
        command: Name of the command, for messages.

    Raises:
        ConfigError: one line; a file that another command takes is said to be its.
    """
    if "=" in str(path) and not Path(path).is_file():
        raise ConfigError(
            f"the config file is missing before the first override: fedkd {command} CONFIG {path}"
        )
    seen: dict[str, str] = {}
    for word in overrides:
        key = word.partition("=")[0].strip()
        if key in seen:
            raise ConfigError(f"{key} is given twice: {seen[key]} and {word}")
        seen[key] = word
    try:
        return load_config(root, path, overrides)
    except ConfigError:
        other = _taken_by(root, path)
        if other is None:
            raise
        raise ConfigError(
            f"{path}: is a config of fedkd {other}, not of fedkd {command}; "
            f"try: fedkd {other} {path}"
        ) from None


def _taken_by(root: type[Section], path: str | Path) -> str | None:
    """The command whose kind of config the file is; None if it is of `root`'s, or of none."""
    from fedkd.studies.attack.config import AttackConfig
    from fedkd.studies.central.config import Study
    from simulations.compare.config import Comparison
    from simulations.compare.grid import Ablation
    from simulations.compare.sweep import Sweep

    kinds: dict[type[Section], str] = {
        Experiment: "run",
        Study: "distill",
        Comparison: "compare",
        Ablation: "ablate",
        Sweep: "privacy sweep",
        AttackConfig: "attack",
    }
    found = [command for kind, command in kinds.items() if kind is not root and _fits(kind, path)]
    return None if _fits(root, path) or not found else found[0]


def _fits(kind: type[Section], path: str | Path) -> bool:
    try:
        load_config(kind, path, plugins=False)
    except ConfigError:
        return False
    return True


def open_run(path: Path, *, trust: bool = False) -> RunDirectory:
    """The run directory at `path`.

    Args:
        path: The folder.
        trust: Import its plugins.

    Raises:
        ConfigError: it is none; the message says what it is instead.
    """
    from fedkd.runs.directory import RunDirectory

    try:
        return RunDirectory.open(path, trust=trust)
    except ConfigError:
        other = _taken_by(Experiment, path / "config.yaml") if path.is_dir() else None
        if other is None:
            raise
        raise ConfigError(
            f"{path}: is a folder of fedkd {other}; expected a run directory, as fedkd run makes it"
        ) from None
