"""What a run comes to, as its JSON files hold it: the types of summary.json and its neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NotRequired

from typing_extensions import TypedDict

#: Clients that a summary, a table or a figure shows one by one at most.
LISTED = 200

CURVES = "noisy.json"
"""In a client's folder: what it measured of each epoch on noisy labels."""


def listed(clients: int, asked: Iterable[int | None]) -> list[int]:
    """The clients that are shown one by one: all, or of many those that were asked last.

    Args:
        clients: How many there are.
        asked: Who was asked, in the order of time; None where it is not known who that was.
    """
    if clients <= LISTED:
        return list(range(clients))
    latest = dict.fromkeys(reversed([client for client in asked if client is not None]))
    return sorted(list(latest)[:LISTED])


class ScoresRecord(TypedDict):
    """`Scores` as plain values."""

    accuracy: float
    per_class: NotRequired[list[float | None]]
    calibration: NotRequired[dict[str, Any] | None]


class StudentRecord(ScoresRecord):
    """The student as it leaves the run, and at its best on the test images."""

    model: str
    parameters: int
    best_accuracy: float
    best_round: int


class TeacherRecord(TypedDict):
    """One client's teacher."""

    client: int
    model: str
    examples: int | None
    accuracy: float | None
    student_on_holdout: float | None


class DetectionRecord(TypedDict):
    """`Detection` as plain values; of a client's held-out images by the client itself."""

    balanced_accuracy: NotRequired[float | None]
    auc: NotRequired[float | None]
    sensitivity: NotRequired[float | None]


class RefusedRecord(TypedDict):
    """`ReplyRefused` as plain values."""

    round: int | None
    phase: str
    client: int | None
    reason: str


class ClientPrivacy(TypedDict):
    """What one client has spent."""

    epsilon: float
    frozen_in: NotRequired[list[int]]


class PrivacyRecord(TypedDict):
    """privacy.json: what is promised, against whom, and what it has cost."""

    mechanism: str
    worst: float
    budget: float
    delta: float
    protects: NotRequired[str]
    against: NotRequired[str]
    assumes: NotRequired[str]
    how: NotRequired[str]
    clients: NotRequired[dict[str, ClientPrivacy]]


class TransferRecord(TypedDict):
    """The common images."""

    size: int
    bytes: float
    labelled: NotRequired[bool]
    fingerprint: NotRequired[str]


class Traffic(TypedDict):
    """Bytes of a phase."""

    down: int
    up: int


class NetworkRecord(TypedDict):
    """`Size` as plain values, and whose it is: of `count` teachers, of assistants, the student."""

    role: str
    model: str
    count: int
    parameters: int
    multiply_adds: int
    trainable: NotRequired[int]


class SpentRecord(TypedDict):
    """What a part of the work took; what nobody measured or assumed is not there.

    `memory` is that of the largest process, `gpu_memory` that of the server's GPU, in bytes.
    """

    seconds: float
    joules: NotRequired[float | None]
    grams: NotRequired[float | None]
    memory: NotRequired[int | None]
    gpu_memory: NotRequired[int | None]


class CostsRecord(TypedDict):
    """What networks and work cost; `energy` says how the joules are known."""

    networks: list[NetworkRecord]
    teachers: SpentRecord
    student: SpentRecord
    run: SpentRecord
    energy: NotRequired[str | None]


class TemperatureRecord(TypedDict):
    """What the student's logits are divided by before they are probabilities.

    `source` are the images that it was found on: `validation`, with true labels, or `transfer`,
    with the student's own targets.
    """

    value: float
    source: str
    images: int
    calibration: dict[str, Any]


class KeptRecord(TypedDict):
    """The round whose student leaves the run, where it is the best on the validation images."""

    round: int
    validation: float
    images: int


class Summary(TypedDict):
    """summary.json."""

    name: str
    seed: int
    rounds: NotRequired[int]
    hash: NotRequired[str]
    classes: list[str]
    class_counts: NotRequired[list[list[int]]]
    wrong_labels: NotRequired[list[float | None]]
    transfer: TransferRecord
    test: NotRequired[dict[str, int]]
    student: StudentRecord
    kept: NotRequired[KeptRecord]
    temperature: NotRequired[TemperatureRecord]
    teachers: list[TeacherRecord]
    ensemble: NotRequired[ScoresRecord | None]
    pseudo_labels: NotRequired[float | None]
    oracle: NotRequired[float | None]
    ceiling: NotRequired[float | None]
    worst_client: NotRequired[float | None]
    degraded_rounds: list[int]
    refused: list[RefusedRecord]
    privacy: NotRequired[PrivacyRecord]
    bytes: dict[str, Traffic]
    seconds: dict[str, float]
    costs: NotRequired[CostsRecord]
    detection: NotRequired[dict[str, DetectionRecord]]
    detection_on_holdout: NotRequired[dict[str, DetectionRecord]]
    heads: NotRequired[dict[str, dict[str, float]]]


class Lineage(TypedDict):
    """lineage.json: the run that this one is without some clients."""

    source: str
    without: list[int]
    mode: str


FILES: dict[str, Any] = {
    "summary.json": Summary,
    "versions.json": dict[str, str],
    "lineage.json": Lineage,
    "privacy.json": PrivacyRecord,
    "saved.json": dict[str, float],
}
