"""What a node must share with the server, in one small file to compare against."""

from __future__ import annotations

from typing import Any

from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import versions


def fingerprint_of(space: ExperimentContext) -> dict[str, Any]:
    """Public facts of this machine's data and packages; nothing of private images."""
    data = space.data
    return {
        "transfer": data.transfer.fingerprint,
        "transfer_images": len(data.transfer),
        "class_map": space.class_map,
        "classes": list(data.classes),
        "shape": list(data.test.shape),
        "versions": versions(),
    }
