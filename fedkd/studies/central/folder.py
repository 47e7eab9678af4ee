"""Where a study of methods keeps each network.

teachers/N/                                   each teacher (teachers/seedS-N/ if trained per seed)
methods/METHOD/seedS/                         each student; its assistants in assistantN/, the
                                              generations before it in generationN/ below
  settings.json  metrics.jsonl  results.json  what it is of, one line per epoch, what came out
  student.pt (teacher.pt, assistant.pt)       the weights after the last epoch
  checkpoint.pt                               only while it is not finished
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from fedkd.config import ConfigError
from fedkd.io.records import append_line, read_json, read_lines
from fedkd.io.tensors import load_state
from fedkd.knowledge.store import write_atomically
from fedkd.runs.directory import write_json
from fedkd.studies.engine import Record


class ScaledRecord(TypedDict):
    """What a student's logits are divided by, found on `images` that nobody learnt from."""

    value: float
    images: int
    ece: float


class TrainingRecord(TypedDict):
    """results.json of one training."""

    model: str
    parameters: int
    last: float
    best: float
    seconds: NotRequired[float | None]
    images_per_second: NotRequired[float | None]
    multiply_adds: NotRequired[int]
    trainable: NotRequired[int]
    joules: NotRequired[float | None]
    memory: NotRequired[int | None]
    gpu_memory: NotRequired[int | None]
    heads: NotRequired[dict[str, float]]
    ece: NotRequired[float]
    temperature: NotRequired[ScaledRecord]


class StudentRecord(TrainingRecord):
    """The same of a student, as its cell leaves it."""

    seed: int
    generations: NotRequired[list[float]]
    ensemble: NotRequired[float]


class EpochRecord(TypedDict):
    """A line of a training's metrics.jsonl."""

    epoch: int
    loss: float
    terms: dict[str, float]
    accuracy: float | None
    gradients: dict[str, float]
    noisy: NotRequired[dict[str, Any]]


ROLES = ("student", "assistant", "teacher")


@dataclass(frozen=True)
class Place:
    """The folder of one training."""

    path: Path
    role: str

    @classmethod
    def of_teacher(cls, folder: Path, number: int, seed: int | None) -> Place:
        """A teacher's place in a study's folder; without a seed it is everybody's."""
        name = str(number) if seed is None else f"seed{seed}-{number}"
        return cls(folder / "teachers" / name, "teacher")

    @classmethod
    def of_student(cls, folder: Path, method: str, seed: int) -> Place:
        """A student's place in a study's folder."""
        return cls(folder / "methods" / method / f"seed{seed}", "student")

    def assistant(self, number: int) -> Place:
        """The place of the assistant on the way to this student, counted from 1."""
        return Place(self.path / f"assistant{number}", "assistant")

    def generation(self, number: int) -> Place:
        """The place of a student before this one, which was its teacher; counted from 1."""
        return Place(self.path / f"generation{number}", "student")

    @property
    def weights(self) -> Path:
        """The trained network."""
        return self.path / f"{self.role}.pt"

    @property
    def checkpoint(self) -> Path:
        """The state to go on from."""
        return self.path / "checkpoint.pt"

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder; a training with other settings makes room."""
        file = self.path / "settings.json"
        if self.path.is_dir() and read_json(file) != settings:
            shutil.rmtree(self.path)
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            write_json(file, settings)

    def result(self) -> Record | None:
        """What came out; None while it is not finished."""
        return cast(Record | None, read_json(self.path / "results.json", TrainingRecord))

    def finish(self, result: Record) -> None:
        """Write down what came out."""
        write_json(self.path / "results.json", result)
        self.checkpoint.unlink(missing_ok=True)

    def epochs(self) -> list[Record]:
        """One record per finished epoch."""
        return cast(list[Record], read_lines(self.path / "metrics.jsonl", EpochRecord))

    def add_epoch(self, record: Record) -> None:
        """Append an epoch's record."""
        append_line(self.path / "metrics.jsonl", record)

    def begin(self) -> Record | None:
        """Read the checkpoint, and forget the epochs that came after it."""
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
