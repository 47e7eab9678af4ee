"""Teachers trained once for all of fedkd's rows that would train the same ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message

from fedkd.config import Experiment, Participation
from fedkd.io.records import read_json
from fedkd.runs.directory import write_json
from fedkd.strategies.groups import members
from fedkd.strategies.records import JOB

Call = Callable[[Message, Context], Message]


def teachers_key(experiment: Experiment) -> str | None:
    """Equal for two experiments whose teachers are bit-identical in every round; None if not known.

    A teacher is a function of its images, its network, its training and the seed. The transfer
    set belongs to the data, since pixel statistics come from it; its virtual views do not. It goes
    on from the rounds in which its client was asked before.
    With feedback a teacher depends on the student; what is drawn for privacy is drawn once for
    each run, and paid for by it.
    """
    if experiment.teachers.feedback.use != "none" or experiment.teachers.privacy is not None:
        return None
    values = experiment.model_dump(mode="json")
    del values["data"]["views"]
    resources = experiment.resources
    known = [
        values["seed"], values["clients"], values["data"], values["teachers"],
        resources.client_cpus, resources.client_gpus, resources.batch_clients, values["plugins"],
    ]  # fmt: skip
    if experiment.teachers.noisy is not None:  # its last epoch is another one
        known.append(experiment.rounds)
    if experiment.federation.participation != Participation():
        known.append(values["federation"]["participation"])
    if experiment.data.transfer.pairs:  # pairs are drawn from the student's side
        known.append(values["student"]["modality"])
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


class TeacherCache:
    """A Flower mod that puts a teacher known already where the client looks for its own.

    A client that finds the teacher of a round trains nothing, as after a restart; all else goes
    its usual way, so nothing but the time changes.

    Args:
        folder: Where teachers are kept; those of one `teachers_key`.

    Attributes:
        saved: Round -> seconds of training that were not spent again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[int, float] = {}

    def __call__(self, message: Message, context: Context, call_next: Call) -> Message:
        """Before and after a client trains."""
        if message.metadata.message_type != "train":
            return call_next(message, context)
        job = message.content.config_records[JOB]
        round_number = int(job["round"])  # type: ignore[arg-type]
        clients = members(message) or [int(context.node_config["partition-id"])]
        names = [f"client-{client:04d}/teacher-{round_number:04d}.pt" for client in clients]
        places = {Path(str(job["state"])) / name: self.folder / name for name in names}
        for place, kept in places.items():
            note = kept.with_suffix(".json")
            if kept.is_file() and note.is_file() and not place.is_file():
                _link(kept, place)
                spent = read_json(note, dict[str, float]) or {}
                self.saved[round_number] = self.saved.get(round_number, 0.0) + spent["seconds"]
        started = time.perf_counter()
        reply = call_next(message, context)
        new = {p: kept for p, kept in places.items() if p.is_file() and not kept.is_file()}
        for place, kept in new.items():
            _link(place, kept)
            write_json(
                kept.with_suffix(".json"), {"seconds": (time.perf_counter() - started) / len(new)}
            )
        return reply


def _link(source: Path, target: Path) -> None:
    """The same file under another name: teachers are replaced, never written into.

    At no time is there no file, or half of one: rows that run beside each other share a cache.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(f".{os.getpid()}.draft")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, draft)
    draft.replace(target)
    draft.unlink(missing_ok=True)  # is still there if both were the same file already
