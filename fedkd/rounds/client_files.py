"""What a client keeps between messages: its last teachers, and its last answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Knowledge
from fedkd.knowledge.query import Answers
from fedkd.knowledge.store import write_atomically
from fedkd.runs.directory import load_state, save_state

KEPT_TEACHERS, KEPT_ANSWERS = 2, 3


class ClientFiles:
    """Files that only their owner may read.

    Args:
        folder: Survives restarts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teacher(self, round_number: int) -> dict[str, Any] | None:
        """The state of a round's teacher, None if there is none. Raises `RuntimeError` if torn."""
        place = self._teacher(round_number)
        return load_state(place) if place.is_file() else None

    def drop_teacher(self, round_number: int) -> None:
        """Forget a round's teacher."""
        self._teacher(round_number).unlink()

    def latest(self, round_number: int) -> Path | None:
        """File of the teacher of this round or of the last one before it."""
        limit = self._teacher(round_number).name
        kept = [p for p in sorted(self.folder.glob("teacher-*.pt")) if p.name <= limit]
        return kept[-1] if kept else None

    def keep_teacher(self, round_number: int, state: dict[str, Any]) -> None:
        """Keep the state of a round's teacher; old ones go."""
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
