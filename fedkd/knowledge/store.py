"""A round's knowledge on disk: accepted once, never lost, read row by row.

One folder per client with one `.npy` per kind and a manifest of their hashes, written beside its
final place, synced and renamed: a killed server finds either all of a client's knowledge or none
of it, and what the disk lost or changed is noticed. Reading maps the files into memory, so what
the server holds does not grow with the number of clients.

Readers change nothing: a run is looked at while its server writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from fedkd.io.records import Damaged, read_json, refuse_link
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Bank, Knowledge, Teacher

MANIFEST = "manifest.json"


class TeacherRecord(TypedDict):
    """What teacher.json holds of a `Teacher`."""

    client: int
    num_examples: int | None
    class_counts: list[int] | None
    parameters: int | None
    knows: NotRequired[list[bool]]


class KnowledgeStore:
    """Knowledge of one round.

    Args:
        folder: Made when something is put into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: set[int] = set()  # clients whose files were written or compared by this object

    # -- write -----------------------------------------------------------------------------

    def put(self, knowledge: Knowledge) -> None:
        """Keep one client's knowledge; a second one of the same client is ignored."""
        client = knowledge.teacher.number
        final = self._place(client)
        if final.exists():
            return
        refuse_link(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{final.name}"
        _remove(draft)  # of a server killed while writing
        draft.mkdir()
        for kind, tensor in knowledge.tensors.items():
            with (draft / f"{kind}.npy").open("wb") as file:
                np.save(file, tensor.numpy(), allow_pickle=False)
        teacher = knowledge.teacher
        facts = {
            "client": client,
            "num_examples": teacher.num_examples,
            "class_counts": teacher.class_counts,
            "parameters": teacher.parameters,
            **({} if teacher.knows is None else {"knows": teacher.knows}),
        }
        (draft / "teacher.json").write_text(json.dumps(facts), encoding="utf-8")
        hashes = {path.name: _hash(path) for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
        for path in (*draft.iterdir(), draft):
            _sync(path)
        draft.rename(final)
        _sync(self.folder)
        self._whole.add(client)

    def sweep(self) -> None:
        """Remove the drafts of a server that was killed while writing; for its successor alone."""
        if self.folder.is_dir():
            refuse_link(self.folder)
            for path in self.folder.iterdir():
                if re.fullmatch(r"\.client-\d{4,}", path.name):
                    _remove(path)

    def drop(self, client: int) -> None:
        """Forget what a client has answered."""
        self._whole.discard(client)
        _remove(self._place(client))

    # -- read ------------------------------------------------------------------------------

    def clients(self) -> list[int]:
        """Who has answered, in order."""
        found = (re.fullmatch(r"client-(\d+)", path.name) for path in self.folder.glob("client-*"))
        return sorted(int(match[1]) for match in found if match)

    def check(self, client: int) -> None:
        """Compare a client's files with the hashes that were written beside them; done once.

        Raises:
            Damaged: one is missing, or not what was written; the message names it.
        """
        if client in self._whole:
            return
        place = self._place(client)
        for path in (self.folder, place):
            refuse_link(path)
        # None where an older version of fedkd wrote it.
        hashes = read_json(place / MANIFEST, dict[str, str])
        for name, known in (hashes or {}).items():
            path = place / Path(name).name
            refuse_link(path)
            if not path.is_file():
                raise Damaged(path, "missing")
            if _hash(path) != known:
                raise Damaged(path, f"not what was written: its hash is not that in {MANIFEST}")
        self._teacher(client)
        self._whole.add(client)

    def bank(self, kinds: Sequence[Kind], clients: Sequence[int] | None = None) -> Bank:
        """Accepted knowledge as memory maps, in client order. Raises `Damaged`.

        Args:
            kinds: What to read.
            clients: Whose, in order; None: that of all who answered.
        """
        teachers, arrays = [], {kind: [] for kind in kinds}  # type: ignore[var-annotated]
        for client in self.clients() if clients is None else clients:
            self.check(client)
            place = self._place(client)
            teachers.append(self._teacher(client))
            for kind in kinds:
                array = _mapped(place / f"{kind}.npy")
                first = arrays[kind][0] if arrays[kind] else array
                if array.shape[:1] != first.shape[:1]:  # the rest may depend on the network
                    raise Damaged(
                        place / f"{kind}.npy",
                        f"shape {array.shape}, where client {teachers[0].number} has {first.shape}",
                    )
                arrays[kind].append(array)
        return Bank(tuple(teachers), arrays)

    def answers(self, client: int, kinds: Sequence[Kind]) -> dict[Kind, np.ndarray]:
        """One client's answers by kind, as memory maps. Raises `Damaged`."""
        self.check(client)
        place = self._place(client)
        return {kind: _mapped(place / f"{kind}.npy") for kind in kinds}

    def fused(self, name: str) -> np.ndarray:
        """What `allocate` gave under this name, as `fuse` filled it."""
        return _mapped(self.folder / "fused" / f"{name}.npy")

    def allocate(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array of the fused round on disk, filled by `fuse`."""
        folder = self.folder / "fused"
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        array: np.ndarray = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape
        )
        return array

    def _teacher(self, client: int) -> Teacher:
        place = self._place(client)
        facts = read_json(place / "teacher.json", TeacherRecord)
        if facts is None:
            raise FileNotFoundError(f"{place / 'teacher.json'} is missing")
        if facts["client"] != client:
            raise Damaged(place / "teacher.json", f"client is {facts['client']}, not {client}")
        counts = facts["class_counts"]
        return Teacher(
            client,
            facts["num_examples"],
            None if counts is None else tuple(counts),
            facts["parameters"],
            knows=tuple(facts["knows"]) if "knows" in facts else None,
        )

    def _place(self, client: int) -> Path:
        return self.folder / f"client-{client:04d}"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems know no such thing for folders
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a file, a folder or a link, never what a link points to."""
    try:
        folder = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if folder:
        shutil.rmtree(path)
    else:
        path.unlink()


# numpy parses headers with `ast`, which CPython 3.11 cannot do in two threads at once ("AST
# constructor recursion depth mismatch").
_HEADERS = threading.Lock()


def _mapped(path: Path) -> np.ndarray:
    """An array on disk as a memory map. Raises `Damaged`, or an `OSError` that names it."""
    try:
        with _HEADERS:
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
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync(path.parent)
