"""A run's folder: everything that happened, in files a person can open.

config.yaml      the resolved config          versions.json  what ran it
config.sha256    hash of its values, which stay the same when the run goes on
signature.json   what its student needs where the data set is not
sessions.json    when somebody worked on it, and how long
metrics.jsonl    one JSON object per event    ledger.jsonl   bytes per message
checkpoints/     student and optimiser after each round
knowledge/       what was accepted, per round and client
clients/         the simulated clients' teachers (on real nodes they stay there)
summary.json, report.html, run.log
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedkd.config import (
    ConfigError,
    Experiment,
    Section,
    import_trusted,
    load_experiment,
    parse_yaml,
)
from fedkd.io.lock import Lock
from fedkd.io.records import Damaged, check_tree, lines, read_json, refuse_link
from fedkd.io.tensors import State, load_state
from fedkd.knowledge.query import Images
from fedkd.knowledge.store import KnowledgeStore, write_atomically
from fedkd.runs.choice import is_over, kept_round, validated
from fedkd.runs.events import (
    ClientsAsked,
    Event,
    MessageCounted,
    RoundFinished,
    SumAsked,
    Warned,
    append_event,
    append_message,
    read_events,
    read_messages,
)
from fedkd.runs.results import FILES

SESSIONS, METRICS, LEDGER = "sessions.json", "metrics.jsonl", "ledger.jsonl"
PINNED = "config.sha256"

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Event)
_PACKAGES = ("fedkd", "torch", "torchvision", "flwr", "ray", "numpy", "opacus")


class RunDirectory:
    """The folder of one run; create it with `new` or open it with `open`."""

    def __init__(
        self, path: Path, experiment: Experiment, identity: str, *, trusted: bool = True
    ) -> None:
        self.path = path
        self.experiment = experiment
        self.identity = identity
        #: Whether its plugins, which are code, may be imported.
        self.trusted = trusted
        #: Held by whoever writes rounds into it.
        self.lock = Lock(path)
        #: Hear of what is written to metrics.jsonl and ledger.jsonl.
        self.listeners: list[Callable[[Event | MessageCounted], None]] = []
        self._stores: dict[tuple[int, Images], KnowledgeStore] = {}

    @classmethod
    def new(cls, experiment: Experiment, parent: str | Path | None = None) -> RunDirectory:
        """A fresh folder under `parent` (default: the config's `output`)."""
        name = f"{experiment.name}-seed{experiment.seed}"
        path = new_folder(parent or experiment.output, name, experiment)
        write_atomically(path / PINNED, f"{_config_hash(path)}\n".encode())
        return cls(path, experiment, path.name)

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False) -> RunDirectory:
        """An existing run, which is only read: nothing in it is made, changed or followed.

        Args:
            path: Its folder.
            trust: Import the plugins that its config names. They are code, and the folder may be
                somebody else's; without, those alone are used that are imported already.

        Raises:
            ConfigError: `path` is no run directory, or something in it is a link.
        """
        path = Path(path).expanduser().resolve()
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is not a run directory (it has no config.yaml)")
        with _refused():
            check_tree(path)
        try:
            experiment = load_experiment(path / "config.yaml", plugins=False)
        except ConfigError as error:
            raise ConfigError(
                f"{path} is not a run directory (its config.yaml is not that of one: {error})"
            ) from None
        run = cls(path, experiment, path.name, trusted=trust)
        try:
            run.import_plugins()
        except ConfigError as error:  # whoever needs one says so; its state can be shown without
            logger.info("%s: %s", path, error)
        return run

    def import_plugins(self) -> None:
        """Import the config's plugins. Raises `ConfigError` if the run is not trusted."""
        import_trusted(self.experiment.plugins, self.path, trust=self.trusted)

    def check_config(self) -> None:
        """Raise `ConfigError` if config.yaml is not the one that the run began with."""
        pinned = self.path / PINNED
        if pinned.is_file() and pinned.read_text(errors="replace").strip() != _config_hash(
            self.path
        ):
            raise ConfigError(
                f"{self.path / 'config.yaml'} was changed since the run began ({PINNED} has the "
                "hash of its values): put it back to go on, or start a new run with it: fedkd run "
                f"{self.path / 'config.yaml'}"
            )

    def record(self, event: Event) -> None:
        """Append one event to metrics.jsonl."""
        append_event(self.path / METRICS, event)
        for listener in self.listeners:
            listener(event)

    def warn(self, text: str) -> None:
        """Record something that people should know."""
        self.record(Warned(text=text))

    def count(self, message: MessageCounted) -> None:
        """Append one message's bytes to ledger.jsonl."""
        if append_message(self.path / LEDGER, message):
            self.warn(
                "a line of ledger.jsonl was cut short, by a crash or a full disk: the bytes of one "
                "message are not counted"
            )
        for listener in self.listeners:
            listener(message)

    def events(self, kind: type[E]) -> list[E]:
        """All events of one class; of every class for `Event`."""
        with _refused():
            return [e for e in read_events(self.path / METRICS) if isinstance(e, kind)]

    def messages(self) -> list[MessageCounted]:
        """All lines of the ledger."""
        with _refused():
            return read_messages(self.path / LEDGER)

    def rewind(self, last_round: int) -> None:
        """Forget events after `last_round`: a resumed run does those rounds again.

        Of the same clients: who was asked, and what that cost, is not forgotten. The ledger keeps
        its lines: what was sent before the crash was sent.
        """
        known = max(
            (e.round for e in self.events(RoundFinished) if e.round <= last_round), default=0
        )
        if known < last_round:
            raise ConfigError(
                f"{self.path / METRICS} is damaged (it ends with round {known}, the checkpoint is "
                f"of round {last_round}); restore it from a copy"
            )
        found = [line for _, line in lines(self.path / METRICS)]
        kept = [
            line
            for line, event in zip(found, map(json.loads, found), strict=True)
            if (event.get("round") or 0) <= last_round
            or event.get("event") in (ClientsAsked.event, SumAsked.event)
        ]
        write_atomically(self.path / METRICS, b"".join(line + b"\n" for line in kept))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this run, or None if it is not there (yet)."""
        with _refused():
            return read_json(self.path / name, FILES.get(name, Any))

    @property
    def log(self) -> Path:
        """Where Flower's and Ray's own output goes."""
        return self.path / "run.log"

    @property
    def clients(self) -> Path:
        """Where simulated clients keep their teachers."""
        return self.path / "clients"

    def client(self, number: int) -> Path:
        """Where one of them does."""
        return self.clients / f"client-{number:04d}"

    def knowledge(self, round_number: int, images: Images = Images.TRANSFER) -> KnowledgeStore:
        """What clients answered about some images in a round."""
        key = (round_number, images)
        if key not in self._stores:  # kept, since it knows whose files it has looked through
            folder = self.path / "knowledge" / f"round-{round_number:04d}"
            with _refused():
                for path in (folder.parent, folder):
                    refuse_link(path)
            self._stores[key] = KnowledgeStore(folder / images)
        return self._stores[key]

    def save_checkpoint(self, round_number: int, state: State) -> None:
        """Keep `state` as the state after `round_number`; those of earlier rounds stay too."""
        save_state(self._checkpoint(round_number), {"round": round_number, **state})

    def load_checkpoint(self, passed_over: Callable[[str], None] | None = None) -> State | None:
        """The newest usable checkpoint, or None; what cannot be used is passed over.

        Args:
            passed_over: Hears of each that is; default: a warning in the log.
        """
        try:
            known = {event.round: event.hash for event in self.events(RoundFinished)}
        except ConfigError:  # a student can be used without what is written about it
            known = {}
        for path in sorted((self.path / "checkpoints").glob("round-*.pt"), reverse=True):
            try:
                with _refused():
                    refuse_link(path)
                state = load_state(path)
                _check_checkpoint(path, state, known)
                return state
            except (RuntimeError, OSError, EOFError, ValueError) as error:
                text = f"checkpoint {path.name} is passed over: {error}"
                if passed_over is None:
                    logger.warning("%s: %s", self.path, text)
                else:
                    passed_over(text)
        return None

    def load_kept(self) -> State | None:
        """The checkpoint whose student leaves the run, or None; see `fedkd.runs.choice`.

        Raises:
            ConfigError: it cannot be read, and is not simply the newest.
        """
        if not self.experiment.evaluation.best:
            return self.load_checkpoint()
        rounds = self.events(RoundFinished)
        number = kept_round(self.experiment, validated(rounds))
        if number is None:
            return None
        path = self._checkpoint(number)
        try:
            with _refused():
                refuse_link(path)
            state = load_state(path)
            _check_checkpoint(path, state, {event.round: event.hash for event in rounds})
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise ConfigError(
                f"{path}: the student of the round that is best on the validation images cannot be "
                f"read ({error})"
            ) from None
        return state

    @property
    def is_over(self) -> bool:
        """Whether no further round comes."""
        return is_over(self.experiment, validated(self.events(RoundFinished)))

    def _checkpoint(self, round_number: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_number:04d}.pt"


def _check_checkpoint(path: Path, state: Any, known: Mapping[int, str | None]) -> None:
    """Raise `ValueError` unless this is the state after the round that the file is named for."""
    student = state.get("student") if isinstance(state, dict) else None
    if not isinstance(student, dict) or not all(isinstance(t, Tensor) for t in student.values()):
        raise ValueError("it holds no student")
    number = state.get("round")
    if path.stem != f"round-{number:04d}" if isinstance(number, int) else True:
        raise ValueError(f"it is of round {number}")
    found = weights_hash(student)
    if known.get(number) not in (None, found):
        raise ValueError(
            f"its student has the hash {found}, metrics.jsonl says {known[number]} of that round"
        )


def _config_hash(path: Path) -> str:
    """Of the values in config.yaml, however they are written."""
    file = path / "config.yaml"
    values = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise ConfigError(str(error)) from None


class Session:
    """The time that a run takes, over all its sessions: interrupted and killed ones too.

    Entered when work on a run begins, left when it ends, however it ends.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._before = _sessions(run)
        self._started, self._clock = time.time(), time.perf_counter()
        self._written = -math.inf

    @property
    def total(self) -> float:
        """Seconds of all sessions so far."""
        earlier: float = sum(record["seconds"] for record in self._before)
        return earlier + self._seconds

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._clock

    def note(self, every: float = 10.0) -> None:
        """Write the time down if that was last done `every` seconds ago; a kill costs no more."""
        if self._seconds - self._written >= every:
            self._written = self._seconds
            now = {"started": self._started, "seconds": self._seconds}
            self._run.write_json(SESSIONS, [*self._before, now])

    def __enter__(self) -> Session:
        self._run.lock.__enter__()
        self.note()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.note(every=0.0)
        finally:
            self._run.lock.__exit__()


def _sessions(run: RunDirectory) -> list[dict[str, float]]:
    """Those that have ended; older runs have only the times of their finished rounds."""
    rounds = run.events(RoundFinished)
    try:
        records = run.read_json(SESSIONS)
        if records is None:
            spent = sum(sum(event.seconds.values()) for event in rounds)
            return [{"started": 0.0, "seconds": float(spent)}] if rounds else []
        records = [{k: float(r[k]) for k in ("started", "seconds")} for r in records]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{run.path / SESSIONS} is damaged ({type(error).__name__}: {error}); remove it: only "
            "the total of seconds is lost"
        ) from None
    if records:  # one that was killed went on until its last message at least
        last = records[-1]
        latest = max((message.time or 0.0 for message in run.messages()), default=0.0)
        last["seconds"] = max(last["seconds"], latest - last["started"])
    return records


def new_folder(parent: str | Path, name: str, config: Section) -> Path:
    """A fresh folder `NAME-DATE-TIME-xxxx` that holds config.yaml and versions.json.

    Raises:
        ConfigError: it cannot be created.
    """
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return begin_folder(Path(parent) / f"{name}-{stamp}", config, "output")


def begin_folder(path: Path, config: Section, key: str) -> Path:
    """A folder of that name with config.yaml and versions.json; its full path.

    Raises:
        ConfigError: it cannot be created; the message names `key`, which asked for it.
    """
    path = path.expanduser().resolve()
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{key}: cannot create {path}: {error.strerror}") from None
    write_atomically(path / "config.yaml", config.to_yaml().encode())
    write_json(path / "versions.json", versions())
    return path


def save_state(path: Path, state: State, *, private: bool = False) -> None:
    """Save tensors and plain values atomically; `private` for their owner's eyes only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue(), private=private)


def network_hash(network: nn.Module) -> str:
    """Hash of all weights and buffers: equal iff two networks are bit-identical."""
    return weights_hash(network.state_dict())


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """`network_hash` of a network with these weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        value: Tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def keep_weights(folder: Path, weights: Mapping[str, str]) -> None:
    """Write down which files of weights a run or study begins with, or see that they are the same.

    They stand in versions.json: like a library, they can change every number.

    Args:
        folder: Of the run or study.
        weights: File, as the config names it -> SHA-256.

    Raises:
        ConfigError: it began with other ones.
    """
    if not weights:
        return
    known = read_json(folder / "versions.json") or {}
    for name, now in weights.items():
        began = known.get(f"weights {name}", now)
        if began != now:
            raise ConfigError(
                f"{folder}: the weights in {name} are not those that it began with (SHA-256 "
                f"{began[:12]} then, {now[:12]} now): put that file back, or begin anew"
            )
    now_known = {**known, **{f"weights {name}": value for name, value in weights.items()}}
    if now_known != known:
        write_json(folder / "versions.json", now_known)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
