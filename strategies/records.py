"""Plain arrays and headers <-> Flower records; the only file that knows both.

Arrays travel as Flower's `.npy` bytes; nothing is pickled. Sizes are checked before anything is
decoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedkd.io.text import ESCAPES, plain
from fedkd.knowledge.query import HeaderValue, Images, Refused, Reply

JOB, STUDENT, METRICS = "job", "student", "metrics"
# To a node that is asked who it is: what to sign; and its answer.
CHALLENGE, SIGNATURE = "challenge", "signature"

# What of the job is the message's own; the rest is the run's: sent once, then named by its digest.
MEMBERS = "members"  # whose work is asked for, where it is not that of the node's own client
MESSAGES_OWN = ("round", "base", MEMBERS)
# Field of a job with that digest; record of a reply by a node that does not know it (any more).
NAMED, UNKNOWN = "named", "unknown"

# Field of a job, and of a node's description of itself: which files of weights it begins with.
WEIGHTS = "weights"

# Bytes of a reply beside the arrays of knowledge: names, numbers, Flower's wrapping.
ENVELOPE = 2**20


def reply_records(images: Images, reply: Reply) -> RecordDict:
    """The records of a reply about some images, for the content of a message.

    Numbers travel as arrays, a codec's bytes beside the header: Flower wraps every array in some
    700 bytes, which may be more than a coded reply has.
    """
    coded = {n: a.tobytes() for n, a in reply.arrays.items() if a.dtype == np.uint8 and a.ndim == 1}
    plain = {name: Array(array) for name, array in reply.arrays.items() if name not in coded}
    content = RecordDict({header_name(images): ConfigRecord({**reply.header, **coded})})
    if plain or not coded:
        content[arrays_name(images)] = ArrayRecord(plain)
    return content


def job_digest(job: Mapping[str, object]) -> bytes:
    """Names the part of a job that is the same in every message of a run."""
    run = {name: value for name, value in job.items() if name not in MESSAGES_OWN}
    text = json.dumps(run, sort_keys=True, default=bytes.hex)
    return hashlib.sha256(text.encode()).digest()[:16]


def other_weights(ours: Mapping[str, str], theirs: object) -> str | None:
    """Which file of weights is another one at the other end; None if none is.

    Args:
        ours: File -> SHA-256.
        theirs: Likewise, as it travels; may hold more.
    """
    try:
        known = json.loads(theirs) if isinstance(theirs, str) else {}
    except ValueError:
        known = {}
    for name, value in sorted(ours.items()):
        other = known.get(name) if isinstance(known, dict) else None
        if other != value:
            return f"{plain(name)} (SHA-256 {plain(str(other))[:12]}, expected {value[:12]})"
    return None


def header_name(images: Images) -> str:
    """Name of the record with the header of a reply about some images."""
    return f"{images}.header"


def arrays_name(images: Images) -> str:
    """Name of the record with the arrays of a reply about some images."""
    return f"{images}.arrays"


def read_replies(content: RecordDict, max_bytes: float) -> dict[Images, Reply]:
    """The replies in a message, by what they are about.

    Raises:
        Refused: there is none, or one is too large or damaged.
    """
    found = {i for i in Images if {header_name(i), arrays_name(i)} & content.keys()}
    if not found:
        raise Refused(f"no knowledge in the reply (it has {sorted(content.keys())})")
    return {images: _read_reply(content, images, max_bytes) for images in sorted(found)}


def _read_reply(content: RecordDict, images: Images, max_bytes: float) -> Reply:
    fields = content.config_records.get(header_name(images))
    numbers = content.array_records.get(arrays_name(images), ArrayRecord())
    if fields is None:
        raise Refused(f"answers about {images} images without a header")
    coded = {name: value for name, value in fields.items() if isinstance(value, bytes)}
    size = sum(len(array.data) for array in numbers.values()) + sum(map(len, coded.values()))
    if size > max_bytes:
        raise Refused(f"payload of {size:,} bytes, at most {int(max_bytes):,} are accepted")
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in coded.items()}
    for name, array in numbers.items():
        if name in arrays:
            raise Refused(f"{name}: is there twice, as an array and as bytes")
        try:
            _check_size(array.data)
            arrays[name] = array.numpy()
        except Exception as error:  # whatever a damaged buffer makes the decoder raise
            raise Refused(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from None
    header: dict[str, HeaderValue] = {}
    for key, value in fields.items():
        if isinstance(value, int | str) or (
            isinstance(value, list) and all(isinstance(n, int) for n in value)
        ):
            header[key] = value  # type: ignore[assignment]
    return Reply(arrays, header)


def _check_size(data: bytes) -> None:
    """Raise `ValueError` unless as much follows as the `.npy` header announces.

    numpy makes room for what the header announces before it looks at the data.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f".npy version {version}, expected (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    size, rest = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if size != rest:
        raise ValueError(f"{size:,} bytes announced, {rest:,} there")


@dataclass(frozen=True)
class Number:
    """What a number in a reply may be.

    Attributes:
        low: Smallest value.
        high: Largest value.
        whole: Whether it is a whole number.
    """

    low: float
    high: float
    whole: bool = False


def read_numbers(
    content: RecordDict, allowed: Mapping[str, Number], required: Collection[str] = ()
) -> dict[str, float | int]:
    """The numbers of a reply, by name.

    Args:
        content: Of the reply; without a metric record it has no numbers.
        allowed: Name -> what the number may be.
        required: Names that have to be there.

    Raises:
        Refused: a name that is not allowed or misses, a value of another type or out of range.
    """
    record = content.metric_records.get(METRICS, MetricRecord())
    found: dict[str, float | int] = {}
    for name, value in record.items():
        if (number := allowed.get(name)) is None:
            raise Refused(
                f"a number called {name!r}; expected {', '.join(sorted(allowed)) or 'none'}"
            )
        kind = "a whole number" if number.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int if number.whole else (int, float)):
            raise Refused(f"{name}: expected {kind}, got {type(value).__name__}")
        if not number.low <= value <= number.high:  # NaN is in no range
            raise Refused(f"{name}: {kind} from {number.low:g} to {number.high:g}, got {value}")
        found[name] = value
    for name in required:
        if name not in found:
            raise Refused(f"no number called {name!r}; it is asked for")
    return found


def check_length(message: Message, arrays: float = 0.0) -> int:
    """Bytes of a reply as Flower serialises it.

    Args:
        message: The reply.
        arrays: Bytes of knowledge that it may hold; the rest has `ENVELOPE`.

    Raises:
        Refused: the reply is longer.
    """
    size, limit = wire_bytes(message), arrays + ENVELOPE
    if size > limit:
        raise Refused(f"a reply of {size:,} bytes, at most {int(limit):,} are accepted")
    return size


def wire_bytes(message: Message) -> int:
    """Bytes of a message as Flower serialises it: every object of its tree, once."""
    return sum(len(item.deflate()) for item in get_all_nested_objects(message).values())


def explain(reason: str) -> str:
    """The last line of an error's reason that names it, without colours or tracebacks."""
    lines = [line.strip() for line in ESCAPES.sub("", reason[-20_000:]).splitlines()]
    lines = [line for line in lines if line]
    named = [line for line in lines if re.match(r"^[\w.]*(Error|Exception|Refused)\b", line)]
    return plain((named or lines or ["no reason given"])[-1])
