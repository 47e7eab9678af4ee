"""Configs as commands take them: each command has its kind, and a file of another kind is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedkd.config import ConfigError, Section, config_text, load_config, read_config

if TYPE_CHECKING:
    from fedkd.runs.directory import RunDirectory

Root = TypeVar("Root", bound=Section)

STUDIES = ("ablate", "attack", "compare", "distill", "privacy sweep")
"""Commands of studies, as their configs name them: `study: compare`."""


def load(root: type[Root], path: str | Path, overrides: Sequence[str], command: str) -> Root:
    """A command's config.

    Args:
        root: The kind of config that the command takes.
        path: A YAML file.
        overrides: `key=value` words; a key twice is refused, as in YAML.
        command: Name of the command, for messages.

    Raises:
        ConfigError: one line; a file of another command names that one.
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
    own = root.model_fields["study"].default if "study" in root.model_fields else "run"
    values = read_config(path)
    other = values.get("study", own if "experiment" in values else "run")
    if other != own and other in (*STUDIES, "run"):
        raise ConfigError(
            f"{path}: is a config of fedkd {other}, not of fedkd {command}; "
            f"try: fedkd {other} {path}"
        )
    return load_config(root, path, overrides)


def as_text(name: str) -> tuple[str, str, str]:
    """A config to be copied: its text, the command that takes it, and a name for the file.

    Args:
        name: A file, or a ready config as `fedkd config list` shows it, also without `configs/`
            and `.yaml`.

    Raises:
        ConfigError: there is none.
    """
    path = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    command = str(read_config(path).get("study", "run"))
    return config_text(path), command, Path(path).name


def open_run(path: Path, *, trust: bool = False) -> RunDirectory:
    """The run directory at `path`.

    Raises:
        ConfigError: it is none; the message says what it is instead.
    """
    from fedkd.runs.directory import RunDirectory
    from fedkd.studies.engine import kind_of

    if (kind := kind_of(path)) is not None:
        raise ConfigError(
            f"{path}: is a folder of fedkd {kind}; expected a run directory, as fedkd run makes it"
        )
    return RunDirectory.open(path, trust=trust)
