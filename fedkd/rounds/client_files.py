"""What a client keeps between messages: its last teachers, and its last answers."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Knowledge
from fedkd.knowledge.query import Answers
from fedkd.knowledge.store import write_atomically
from fedkd.runs.directory import load_state, save_state
from fedkd.training.supervised import Fit

logger = logging.getLogger(__name__)

KEPT_TEACHERS, KEPT_ANSWERS = 2, 3


@dataclass(frozen=True)
class SavedTeacher:
    """A trained teacher.

    Attributes:
        weights: Of its network, on the CPU.
        fit: What the training gave.
        seal: Of the privacy account it belongs to; empty without one.
        name: Of its file; empty before it is kept.
    """

    weights: Mapping[str, Tensor]
    fit: Fit
    seal: str = ""
    name: str = ""


class ClientFiles:
    """Files below `folder`, which survives restarts, that only their owner may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teacher(self, round_number: int) -> SavedTeacher | None:
        """The teacher of a round; None if there is none, or the disk lost it."""
        place = self._teacher(round_number)
        if not place.is_file():
            return None
        try:
            return _read(place)
        except (RuntimeError, KeyError, TypeError) as error:
            logger.warning("%s; it is trained again", error)
            place.unlink()
            return None

    def latest(self, round_number: int) -> SavedTeacher | None:
        """The teacher of this round, or the last one before it."""
        limit = self._teacher(round_number).name
        kept = [p for p in sorted(self.folder.glob("teacher-*.pt")) if p.name <= limit]
        return _read(kept[-1]) if kept else None

    def keep_teacher(self, round_number: int, teacher: SavedTeacher) -> None:
        """Keep a round's teacher; old ones go."""
        state = {"weights": teacher.weights, **asdict(teacher.fit), "seal": teacher.seal}
        save_state(self._teacher(round_number), state, private=True)
        for old in sorted(self.folder.glob("teacher-*.pt"))[:-KEPT_TEACHERS]:
            old.unlink()

    def answers(self, round_number: int, kinds: tuple[Kind, ...]) -> Answers | None:
        """The answers of one round, 0 for none; None if they are not there (any more)."""
        place = self._answers(round_number)
        if round_number == 0 or not place.is_file():
            return None
        with np.load(place, allow_pickle=False) as saved:
            return {kind: saved[str(kind)] for kind in kinds if str(kind) in saved}

    def keep_answers(self, round_number: int, knowledge: Knowledge) -> None:
        """Keep the answers of a round; old ones go."""
        buffer = io.BytesIO()
        arrays = {str(kind): tensor.numpy() for kind, tensor in knowledge.tensors.items()}
        np.savez(buffer, allow_pickle=False, **arrays)
        write_atomically(self._answers(round_number), buffer.getvalue(), private=True)
        for old in sorted(self.folder.glob("answers-*.npz"))[:-KEPT_ANSWERS]:
            old.unlink()

    def _teacher(self, round_number: int) -> Path:
        return self.folder / f"teacher-{round_number:04d}.pt"

    def _answers(self, round_number: int) -> Path:
        return self.folder / f"answers-{round_number:04d}.npz"


def _read(place: Path) -> SavedTeacher:
    state = load_state(place)
    fit = Fit(state["loss"], state["accuracy"])
    return SavedTeacher(state["weights"], fit, state.get("seal", ""), place.name)
