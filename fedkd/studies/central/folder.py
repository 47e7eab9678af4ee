"""A study's folder: everything that happened, in files a person can open.

config.yaml  results.json  report.html        the resolved config, the table, the page
versions.json  images.json                    what ran it, and on which images
teachers/N/                                   each teacher (teachers/seedS-N/ if trained per seed)
methods/METHOD/seedS/                         each student; its assistants in assistantN/ below
  metrics.jsonl  results.json                 one line per epoch; what came out
  student.pt (teacher.pt, assistant.pt)       the weights after the last epoch
  checkpoint.pt                               only while it is not finished
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedkd.config import ConfigError, import_trusted, read_yaml
from fedkd.io.lock import Lock
from fedkd.io.records import (
    EPOCH,
    SHAPES,
    TRAINING,
    append_line,
    check_tree,
    read_json,
    read_lines,
)
from fedkd.knowledge.store import write_atomically
from fedkd.runs.directory import load_state, new_folder, write_json
from fedkd.studies.central.config import Study, load_study

Record = dict[str, Any]
ROLES = ("student", "assistant", "teacher")


class Place:
    """The folder of one training."""

    def __init__(self, path: Path, role: str) -> None:
        self.path = path
        self.role = role

    @property
    def weights(self) -> Path:
        """The trained network."""
        return self.path / f"{self.role}.pt"

    @property
    def checkpoint(self) -> Path:
        """The state to go on from."""
        return self.path / "checkpoint.pt"

    def result(self) -> Record | None:
        """What came out; None while it is not finished."""
        shape = {**TRAINING, "seed": int} if self.role == "student" else TRAINING
        return read_json(self.path / "results.json", shape)

    def finish(self, result: Record) -> None:
        """Write down what came out."""
        write_json(self.path / "results.json", result)
        self.checkpoint.unlink(missing_ok=True)

    def epochs(self) -> list[Record]:
        """One record per finished epoch."""
        return list(read_lines(self.path / "metrics.jsonl", EPOCH))

    def add_epoch(self, record: Record) -> None:
        """Append an epoch's record."""
        append_line(self.path / "metrics.jsonl", record)

    def begin(self) -> Record | None:
        """Make the folder, or read the checkpoint and forget the epochs that came after it."""
        self.path.mkdir(parents=True, exist_ok=True)
        state = None
        if self.checkpoint.is_file():
            try:
                state = load_state(self.checkpoint)
            except RuntimeError as error:
                raise ConfigError(f"{error}; remove it to train this network anew") from None
        last = 0 if state is None else state["epoch"]
        kept = [record for record in self.epochs() if record["epoch"] <= last]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.path / "metrics.jsonl", text.encode())
        return state


class StudyFolder:
    """The folder of one study; create it with `new` or open it with `open`."""

    def __init__(self, path: Path, study: Study, *, trusted: bool = True) -> None:
        self.path = path
        self.study = study
        self._trusted = trusted
        #: Held by whoever trains networks of the study.
        self.lock = Lock(path)

    @classmethod
    def new(cls, study: Study, parent: str | Path | None = None) -> StudyFolder:
        """A fresh folder under `parent` (default: the config's `output`)."""
        return cls(new_folder(parent or study.output, study.name, study), study)

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False) -> StudyFolder:
        """An existing one, which is only read. Raises `ConfigError` if `path` is none.

        Args:
            path: The folder.
            trust: Import the plugins that its config names: they are code.
        """
        path = Path(path).expanduser().resolve()
        if not cls.is_one(path):
            raise ConfigError(
                f"{path} is not the folder of a study (it has no config.yaml with methods)"
            )
        check_tree(path)
        folder = cls(path, load_study(path / "config.yaml", plugins=False), trusted=trust)
        with suppress(ConfigError):  # whoever needs one says so; results are shown without
            folder.import_plugins()
        return folder

    def import_plugins(self) -> None:
        """Import the config's plugins. Raises `ConfigError` if the folder is not trusted."""
        import_trusted(self.study.plugins, self.path, trust=self._trusted)

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether `path` holds a study (and not a federation's run)."""
        file = path / "config.yaml"
        if not file.is_file():
            return False
        values = read_yaml(file)
        return isinstance(values, dict) and "methods" in values

    def teacher(self, number: int, seed: int) -> Place:
        """The folder of a teacher."""
        name = f"seed{seed}-{number}" if self.study.teachers_per_seed else str(number)
        return Place(self.path / "teachers" / name, "teacher")

    def student(self, method: str, seed: int) -> Place:
        """The folder of a student."""
        return Place(self.path / "methods" / method / f"seed{seed}", "student")

    def assistant(self, method: str, seed: int, number: int) -> Place:
        """The folder of an assistant, counted from 1."""
        return Place(self.student(method, seed).path / f"assistant{number}", "assistant")

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this study, or None if it is not there (yet)."""
        return read_json(self.path / name, SHAPES.get(name))
