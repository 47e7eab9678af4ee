"""A round's knowledge on disk: accepted once, never lost, read row by row.

One folder per client with one `.npy` per kind, written beside its final place and renamed, so a
killed server finds either all of a client's knowledge or none of it. Reading maps the files into
memory, so what the server holds does not grow with the number of clients.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Bank, Knowledge, Teacher
from fedkd.records import TEACHER, Damaged, read_json


class KnowledgeStore:
    """Knowledge of one round.

    Args:
        folder: Created if absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".client-*"):  # of a server killed while writing
            shutil.rmtree(leftover)

    def put(self, knowledge: Knowledge) -> None:
        """Keep one client's knowledge; a second one of the same client is ignored."""
        final = self._place(knowledge.teacher.client)
        if final.exists():
            return
        draft = self.folder / f".{final.name}"
        draft.mkdir()
        for kind, tensor in knowledge.tensors.items():
            np.save(draft / f"{kind}.npy", tensor.numpy(), allow_pickle=False)
        teacher = knowledge.teacher
        facts = asdict(teacher)
        (draft / "teacher.json").write_text(json.dumps(facts), encoding="utf-8")
        draft.rename(final)

    def clients(self) -> list[int]:
        """Who has answered, in order."""
        found = (re.fullmatch(r"client-(\d+)", path.name) for path in self.folder.glob("client-*"))
        return sorted(int(match[1]) for match in found if match)

    def bank(self, kinds: Sequence[Kind]) -> Bank:
        """All accepted knowledge as memory maps, in client order."""
        teachers, arrays = [], {kind: [] for kind in kinds}  # type: ignore[var-annotated]
        for client in self.clients():
            place = self._place(client)
            facts = read_json(place / "teacher.json", TEACHER)
            if facts is None:
                raise FileNotFoundError(f"{place / 'teacher.json'} is missing")
            if facts["client"] != client:
                raise Damaged(place / "teacher.json", f"client is {facts['client']}, not {client}")
            counts = facts["class_counts"]
            facts["class_counts"] = None if counts is None else tuple(counts)
            teachers.append(Teacher(**{key: facts[key] for key in TEACHER}))
            for kind in kinds:
                array = _mapped(place / f"{kind}.npy")
                first = arrays[kind][0] if arrays[kind] else array
                if array.shape != first.shape:
                    raise Damaged(
                        place / f"{kind}.npy",
                        f"shape {array.shape}, where client {teachers[0].client} has {first.shape}",
                    )
                arrays[kind].append(array)
        return Bank(tuple(teachers), arrays)

    def answers(self, client: int, kinds: Sequence[Kind]) -> dict[Kind, np.ndarray]:
        """What one client has said of each kind, as memory maps."""
        place = self._place(client)
        return {kind: _mapped(place / f"{kind}.npy") for kind in kinds}

    def fused(self, name: str) -> np.ndarray:
        """What `allocate` gave under this name, as `fuse` filled it."""
        return _mapped(self.folder / "fused" / f"{name}.npy")

    def allocate(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array of the fused round on disk, filled by `fuse`."""
        folder = self.folder / "fused"
        folder.mkdir(exist_ok=True)
        array: np.ndarray = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape
        )
        return array

    def _place(self, client: int) -> Path:
        return self.folder / f"client-{client:04d}"


def _mapped(path: Path) -> np.ndarray:
    """An array on disk as a memory map. Raises `Damaged`, or an `OSError` that names it."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy reports a damaged header in half a dozen exception types
        raise Damaged(path, f"not an array: {error}") from None
    return array


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file so that a crash leaves the old content or the new one, never half of it.

    Args:
        path: Its folder is made if it is missing.
        data: What is written.
        private: Only the owner may read the file, and a folder made for it.
    """
    path.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    mode = 0o600 if private else 0o666
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
