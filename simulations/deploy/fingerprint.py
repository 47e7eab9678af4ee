"""What a node must share with the server, in one small file to compare against."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import versions


class Fingerprint(TypedDict):
    """fingerprint.json, and what deployments add to it."""

    transfer: str
    transfer_images: NotRequired[int]
    class_map: str
    classes: NotRequired[list[str]]
    shape: NotRequired[list[int]]
    versions: dict[str, str]
    app: NotRequired[str | None]


def fingerprint_of(space: ExperimentContext) -> Fingerprint:
    """Public facts of this machine's data and packages; nothing of private images."""
    data = space.data
    return {
        "transfer": data.fingerprint,
        "transfer_images": len(data.transfer),
        "class_map": space.class_map,
        "classes": list(data.classes),
        "shape": list(data.test.shape),
        "versions": versions(),
    }
