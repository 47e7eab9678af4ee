"""Random changes to the replies of a client: what a hostile node might send."""

import math
import random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkd.knowledge.query import Images
from fedkd.strategies.records import METRICS, arrays_name, header_name

RECORDS = [name(images) for images in Images for name in (header_name, arrays_name)]

NAMES = [
    "round", "client", "seconds", "event", "self", "phase", "run", "", "x" * 3000, "\x1b[2J",
    "loss", "accuracy", "epsilon", "trained", "holdout_right", "holdout_total", METRICS,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2**62, -(2**62), 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf, True,
           [1, 2], [0.5], []]  # fmt: skip
VALUES = [*NUMBERS, "", "x", "x" * 200_000, b"", b"\0" * 1000, ["a"], [b"a"], [True]]
CODES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 99]
REASONS = [
    "",
    "ActorDiedError",
    "\x1b]0;a\x07" * 50,
    "Error: " + "x" * 500_000,
    "\n" * 9,
    "é\u202e",
]


def _record(value: Any, name: str) -> Any:
    """A record of a random kind with one entry, if Flower takes it."""
    for kind in (MetricRecord, ConfigRecord):
        try:
            return kind({name: value})
        except (TypeError, ValueError):
            continue
    return ConfigRecord()


def mutated(content: RecordDict, draw: random.Random) -> RecordDict:
    """One to three changes to the records of a reply."""
    records: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            records[name] = ArrayRecord(dict(record))
        else:
            records[name] = type(record)(dict(record))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        name = draw.choice([*records, METRICS, *RECORDS, "describe", draw.choice(NAMES)])
        action = draw.choice(["drop", "replace", "entry", "entry", "entry", "less", "array"])
        record = records.get(name)
        if action == "drop":
            records.pop(name, None)
        elif action == "replace" or record is None:
            records[name] = _record(draw.choice(VALUES), draw.choice(NAMES))
        elif isinstance(record, ArrayRecord):
            _change_array(record, draw)
        elif action == "less" and len(record):
            del record[draw.choice(list(record))]
        else:
            try:
                record[draw.choice([*record, *NAMES])] = draw.choice(VALUES)
            except (TypeError, ValueError):
                records[name] = _record(draw.choice(VALUES), draw.choice(NAMES))
    return RecordDict(records)


def _change_array(record: ArrayRecord, draw: random.Random) -> None:
    name = draw.choice([*record, "logits", "x" * 500])
    kind = draw.choice(["bytes", "dtype", "shape", "gone", "value"])
    if kind == "gone" or name not in record:
        record.pop(name, None)
        record[draw.choice(NAMES) or "a"] = Array(np.zeros(draw.choice([0, 1, 7])))
    elif kind == "bytes":
        old = record[name]
        cut = old.data[: draw.randrange(len(old.data) + 1)] + draw.randbytes(
            draw.choice([0, 3, 50])
        )
        record[name] = Array(old.dtype, old.shape, old.stype, cut)
    else:
        try:
            values = record[name].numpy()
        except Exception:  # whatever a damaged buffer makes the decoder raise
            return
        if values.dtype.kind == "S":  # text by an earlier change
            return
        if kind == "dtype":
            values = values.astype(draw.choice(["float64", "int64", "bool", ">f4", "S3"]))
        elif kind == "shape":
            values = values[: draw.randrange(2)] if draw.random() < 0.5 else values[..., None]
        else:
            values = values.astype("float32" if values.dtype.kind == "i" else values.dtype)
            values.reshape(-1)[:1] = draw.choice([math.nan, math.inf, -6e4])
        record[name] = Array(values)
