"""What happened in a run, as typed records: the lines of metrics.jsonl and of ledger.jsonl.

A line is an object with the event's name and the fields of its class; fields that are not known are
left out of it. Only what is declared here is read: a file of another version may hold more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedkd.distillation.trainer import EpochRecord
from fedkd.io.records import append_line, lines, parsed
from fedkd.training.detection import Detection
from fedkd.training.evaluation import Scores

#: Phases of a round whose messages are counted.
PhaseName = Literal["describe", "train", "keys", "masked", "knowledge", "distil", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run."""

    event: ClassVar[str]

    def facts(self) -> Mapping[str, Any]:
        """The fields that are known, as plain values."""
        return _known(self)


def _known(record: Event | MessageCounted) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}


@dataclass(frozen=True)
class DomainScores:
    """Accuracies on the test images in one of the clients' domains.

    Attributes:
        name: The domain.
        student: The student's.
        teachers: Client -> its teacher's.
    """

    name: str
    student: float
    teachers: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoundFinished(Event):
    """A round is over and its student kept.

    Attributes:
        round: From 1.
        hash: Of the student's weights.
        status: `ok`, or `degraded` where too few clients answered.
        answered: Clients whose knowledge was used.
        seconds: Per phase.
        joules: Per phase, where the machine counts them.
        memory: Per phase, bytes of the largest process that worked.
        gpu_memory: Per phase, bytes on the server's GPU.
        student: On the test images.
        validation: The student's accuracy on the validation images.
        teachers: Client -> accuracy on the test images.
        ensemble: The fused teachers on the test images.
        weights: Client -> share of the ensemble, where the rules weigh clients.
        server_teachers: Accuracy on the test images of each of the server's own teachers.
        server_weights: Their shares of the ensemble, where the rules weigh teachers.
        pseudo_labels: Accuracy of the fused answers on the transfer set.
        detection: `student`, `ensemble`, a client's number -> how well each class is found on the
            test images; empty where it is not measured.
        sources: On the test images in each source domain, in their order; None without domains.
        heads: Whose, as in `detection` -> head -> accuracy on the test images; empty where the
            student has a single one. Other accuracies are then means over the heads.
    """

    event: ClassVar[str] = "round"
    round: int
    student: Scores
    hash: str | None = None
    status: str = "ok"
    answered: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    gpu_memory: dict[str, int] = field(default_factory=dict)
    validation: float | None = None
    teachers: dict[int, float | None] = field(default_factory=dict)
    ensemble: Scores | None = None
    weights: dict[int, float] = field(default_factory=dict)
    server_teachers: list[float] = field(default_factory=list)
    server_weights: list[float] = field(default_factory=list)
    pseudo_labels: float | None = None
    detection: dict[str, Detection] = field(default_factory=dict)
    sources: list[DomainScores] | None = None
    heads: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClientsAsked(Event):
    """The cohort of a round, where that is not simply all clients.

    Attributes:
        asked: In the order of the draw.
        wanted: How many of them the round is meant to learn from.
        there: Who could have been asked, as `0-3,7`.
    """

    event: ClassVar[str] = "asked"
    round: int
    asked: list[int]
    wanted: int
    there: str


@dataclass(frozen=True, kw_only=True)
class OldAnswersCounted(Event):
    """Clients that did not answer in a round and counted by earlier answers.

    Attributes:
        round: From 1.
        clients: Client -> the round of its answers.
    """

    event: ClassVar[str] = "stale"
    round: int
    clients: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class EpochFinished(EpochRecord, Event):
    """The student saw the transfer set once."""

    event: ClassVar[str] = "epoch"
    round: int


@dataclass(frozen=True, kw_only=True)
class AssistantEpochFinished(EpochRecord, Event):
    """An assistant saw the transfer set once."""

    event: ClassVar[str] = "assistant_epoch"
    round: int


@dataclass(frozen=True, kw_only=True)
class ClientTrained(Event):
    """A client trained its teacher.

    Attributes:
        loss: Mean over its images in the last epoch.
        accuracy: On them.
        epsilon: What it has spent of its privacy budget.
        trained: 0 where the budget left nothing to train with.
    """

    event: ClassVar[str] = "client"
    phase: Literal["train"] = "train"
    round: int
    client: int
    seconds: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    epsilon: float | None = None
    trained: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClientEvaluated(Event):
    """A client counted how many of its held-out images the student gets right.

    Where classes are uneven it says more, as `Detection` does; by images of its own, which may be
    of few classes.
    """

    event: ClassVar[str] = "client"
    phase: Literal["evaluate"] = "evaluate"
    round: int
    client: int
    holdout_right: float
    holdout_total: float
    balanced_accuracy: float | None = None
    auc: float | None = None
    sensitivity: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReplyRefused(Event):
    """A reply is not used, or a client not asked; no client where the node is not known."""

    event: ClassVar[str] = "refused"
    round: int | None = None
    phase: str
    client: int | None = None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Strike(Event):
    """A client misbehaved: enough of these and it is left out."""

    event: ClassVar[str] = "strike"
    round: int
    client: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class StrikesLifted(Event):
    """Somebody forgave a client its strikes."""

    event: ClassVar[str] = "lift"
    client: int


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something that people should know."""

    event: ClassVar[str] = "warning"
    text: str


@dataclass(frozen=True, kw_only=True)
class ClientsErased(Event):
    """Files that came from these clients were deleted."""

    event: ClassVar[str] = "erased"
    clients: list[int]
    paths: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class AnswersReleased(Event):
    """A mechanism answered about some transfer images; `mu` is its cost (Gaussian DP).

    Attributes:
        cells: How many cells of them were asked about; 0: single images.
    """

    event: ClassVar[str] = "release"
    round: int
    answered: int
    mu: float
    epsilon: float
    mechanism: str = ""
    delta: float | None = None
    unit: str = ""
    cells: int = 0


@dataclass(frozen=True, kw_only=True)
class SumAsked(Event):
    """Clients were given each other's keys and asked for their masked votes.

    Recorded before they are: whatever becomes of it, each of them may have answered.

    Attributes:
        attempt: From 1, in this round.
        clients: Who is in the sum.
        mu: What an answer costs each (Gaussian DP).
    """

    event: ClassVar[str] = "sum"
    round: int
    attempt: int
    clients: list[int]
    mu: float


@dataclass(frozen=True, kw_only=True)
class MessageCounted:
    """A message and its reply: a line of ledger.jsonl.

    Attributes:
        client: None while it is not known which one a node is.
        down: Bytes to the client.
        up: Bytes from it.
        seconds: Until the reply came.
        time: When it came (Unix time).
    """

    round: int
    phase: PhaseName
    client: int | None = None
    down: int
    up: int
    seconds: float | None = None
    time: float | None = None


_OF_A_CLIENT = Annotated[ClientTrained | ClientEvaluated, Field(discriminator="phase")]
_KINDS: dict[str, Any] = {kind.event: kind for kind in Event.__subclasses__()} | {
    "client": _OF_A_CLIENT
}


@dataclass(frozen=True)
class _Named:
    event: str


def append_event(path: Path, event: Event) -> None:
    """Append one event to metrics.jsonl."""
    append_line(path, {"event": event.event, **event.facts()})


def read_events(path: Path) -> Iterator[Event]:
    """The events of metrics.jsonl; those of names that are not known are passed over.

    Raises:
        Damaged: a line is not what is written here, and which.
    """
    for where, line in lines(path):
        kind = _KINDS.get(parsed(line, _Named, where).event)
        if kind is not None:
            yield parsed(line, kind, where)


def append_message(path: Path, message: MessageCounted) -> bool:
    """Append one message to ledger.jsonl; whether a line that a crash cut short was dropped."""
    return append_line(path, _known(message))


def read_messages(path: Path) -> list[MessageCounted]:
    """The messages of ledger.jsonl. Raises `Damaged` as `read_events`."""
    return [parsed(line, MessageCounted, where) for where, line in lines(path)]


def holdout_accuracies(events: Iterable[ClientEvaluated]) -> dict[int, float]:
    """Client -> share of its held-out images that the student gets right, of its last report."""
    return {e.client: e.holdout_right / e.holdout_total for e in events if e.holdout_total}


def seconds_by_phase(rounds: Iterable[RoundFinished]) -> dict[str, float]:
    """Phase -> seconds of all rounds."""
    sums: Counter[str] = Counter()
    for event in rounds:
        sums.update(event.seconds)
    return dict(sums)
