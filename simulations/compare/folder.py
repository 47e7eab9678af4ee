"""A comparison's folder: everything that happened, in files a person can open.

config.yaml  versions.json       the resolved config, what ran it
images.json                      fingerprints of the images it began with
results.json  results.csv  rounds.csv  report.html
methods/NAME/seed0.json          what came out (or the error), written when it is finished
methods/NAME/seed0/              fedkd's own run directory, less the knowledge of its rounds
teachers/HASH/                   teachers that several of fedkd's rows share
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedkd.config import ConfigError, import_trusted, load_config, read_yaml
from fedkd.io.lock import Lock
from fedkd.io.records import ROW, SHAPES, check_tree, read_json
from fedkd.knowledge.store import write_atomically
from fedkd.runs.directory import new_folder, versions, write_json
from simulations.compare.config import Comparison
from simulations.compare.entries import Entry
from simulations.compare.grid import Ablation
from simulations.compare.sweep import Sweep

Record = dict[str, Any]
Config = Comparison | Ablation | Sweep


class CompareFolder:
    """The folder of one comparison or ablation; create it with `new` or open it with `open`."""

    def __init__(self, path: Path, config: Config, *, trusted: bool = True) -> None:
        self.path = path
        self._trusted = trusted
        #: Held by whoever runs rows.
        self.lock = Lock(path)
        self.config = config
        self.entries = config.entries()

    @classmethod
    def new(cls, config: Config, parent: str | Path | None = None) -> CompareFolder:
        """A fresh folder under `parent` (default: the config's `output`)."""
        return cls(new_folder(parent or config.output, config.name, config), config)

    @classmethod
    def open(
        cls, path: str | Path, config: Config | None = None, *, trust: bool = False
    ) -> CompareFolder:
        """An existing one, with its own config or a new one, under which it goes on.

        Args:
            path: The folder.
            config: The new config.
            trust: Import the plugins that its own config names: they are code.

        Raises:
            ConfigError: `path` is none, or of the other sort than `config`.
        """
        path = Path(path).expanduser().resolve()
        sort = cls.sort_of(path)
        if sort is None:
            raise ConfigError(
                f"{path} is not the folder of a comparison, an ablation or a sweep (it has no "
                "config.yaml with seeds and methods, grid or mechanisms)"
            )
        check_tree(path)
        if config is None:
            own = load_config(sort, path / "config.yaml", plugins=False)
            folder = cls(path, own, trusted=trust)
            with suppress(ConfigError):  # whoever needs one says so; results are shown without
                folder.import_plugins()
            return folder
        if not isinstance(config, sort):
            raise ConfigError(f"{path} is of another sort: its config is a {sort.__name__}")
        folder = cls(path, config)
        with folder.lock:
            write_atomically(path / "config.yaml", config.to_yaml().encode())
            write_json(path / "versions.json", versions())
        return folder

    def import_plugins(self) -> None:
        """Import the config's plugins. Raises `ConfigError` if the folder is not trusted."""
        import_trusted(self.config.plugins, self.path, trust=self._trusted)

    @staticmethod
    def sort_of(path: Path) -> type[Comparison] | type[Ablation] | type[Sweep] | None:
        """What `path` holds; None if it is neither."""
        file = path / "config.yaml"
        if not file.is_file():
            return None
        values = read_yaml(file)
        if not isinstance(values, Mapping) or "fusion" not in values:  # a study has methods too
            return None
        if "methods" in values:
            return Comparison
        return Ablation if "grid" in values else Sweep if "mechanisms" in values else None

    def run_path(self, entry: Entry, seed: int) -> Path:
        """fedkd's run directory of a row and seed."""
        return self.path / "methods" / entry.name / f"seed{seed}"

    @property
    def teachers(self) -> Path:
        """Teachers that rows share."""
        return self.path / "teachers"

    def result(self, entry: Entry, seed: int) -> Record | None:
        """What came out of this very config; None while there is nothing (or of another config)."""
        record: Record | None = read_json(self._result_path(entry, seed), ROW)
        if record is None or not entry.gave(record.get("settings", {}), seed):
            return None
        return record

    def is_finished(self, entry: Entry, seed: int) -> bool:
        """Whether there is nothing left to do; what failed is tried again."""
        record = self.result(entry, seed)
        return record is not None and "error" not in record

    def finish(self, entry: Entry, seed: int, facts: Record) -> None:
        """Write down what came out."""
        place = self._result_path(entry, seed)
        place.parent.mkdir(parents=True, exist_ok=True)
        record = {"name": entry.name, "seed": seed, "settings": entry.settings(seed), **facts}
        write_json(place, record)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this folder, or None if it is not there (yet)."""
        return read_json(self.path / name, SHAPES.get(name))

    def _result_path(self, entry: Entry, seed: int) -> Path:
        return self.path / "methods" / entry.name / f"seed{seed}.json"
