"""What a client keeps between messages: its last teachers, and its last answers."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Knowledge
from fedkd.knowledge.query import Answers
from fedkd.knowledge.store import write_atomically
from fedkd.runs.directory import save_state
from fedkd.runs.results import CURVES
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
        followed: What a training on noisy labels goes on from.
        name: Of its file; empty before it is kept.
    """

    weights: Mapping[str, Tensor]
    fit: Fit
    seal: str = ""
    followed: Mapping[str, Any] | None = None
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
        if teacher.followed is not None:
            state["followed"] = teacher.followed
        save_state(self._teacher(round_number), state, private=True)
        for old in sorted(self.folder.glob("teacher-*.pt"))[:-KEPT_TEACHERS]:
            old.unlink()

    def keep_curves(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep what was measured of each epoch on noisy labels; it stays with the client."""
        write_atomically(self.folder / CURVES, json.dumps(records).encode(), private=True)

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


class TeacherCache:
    """Bounds the disk that the clients of a simulation take for what the next round may go on from.

    What was kept in the last round always stays. Of the other clients, those that were asked
    longest ago lose their teachers and answers first, and nothing else: asked again, they begin
    from an untrained network. Only rounds and numbers of clients decide, so a run that was killed
    removes the same ones.

    Args:
        folder: With a folder for each client that has been asked.
        limit: In bytes.
        round_number: The last round that is finished.
    """

    def __init__(self, folder: Path, limit: float, round_number: int) -> None:
        self._folder = folder
        self._limit = limit
        self._kept: dict[int, tuple[int, int]] = {}  # client -> last round, bytes
        found = (re.fullmatch(r"client-(\d+)", place.name) for place in folder.glob("client-*"))
        self._look([int(match[1]) for match in found if match], round_number)

    def trim(
        self, round_number: int, asked: Collection[int] = (), busy: Collection[int] = ()
    ) -> list[int]:
        """Make room after a round.

        Args:
            round_number: The round that has ended.
            asked: Clients that it asked.
            busy: Clients that are training: they may be about to read what they go on from.

        Returns:
            The clients whose teachers were removed.
        """
        self._look(asked, round_number)
        gone: list[int] = []
        total = sum(size for _, size in self._kept.values())
        if total > self._limit:
            for client in sorted(self._kept, key=lambda client: (self._kept[client][0], client)):
                last, size = self._kept[client]
                if total <= self._limit or last >= round_number:
                    break
                if client in busy:
                    continue
                for path, _ in self._files(client, round_number):
                    path.unlink(missing_ok=True)
                del self._kept[client]
                total -= size
                gone.append(client)
        return gone

    def _look(self, clients: Collection[int], until: int) -> None:
        for client in clients:
            files = self._files(client, until)
            if files:
                size = sum(path.stat().st_size for path, _ in files)
                self._kept[client] = max(number for _, number in files), size

    def _files(self, client: int, until: int) -> list[tuple[Path, int]]:
        """What a client keeps of the rounds up to this one, with their numbers."""
        place = self._folder / f"client-{client:04d}"
        found = (
            (path, re.fullmatch(r"(?:teacher-(\d+)\.pt|answers-(\d+)\.npz)", path.name))
            for path in place.glob("*-*")
        )
        numbered = [(path, int(match[1] or match[2])) for path, match in found if match]
        return [(path, number) for path, number in numbered if number <= until]


def _read(place: Path) -> SavedTeacher:
    state = load_state(place)
    fit = Fit(state["loss"], state["accuracy"])
    seal, followed = state.get("seal", ""), state.get("followed")
    return SavedTeacher(state["weights"], fit, seal, followed, place.name)
