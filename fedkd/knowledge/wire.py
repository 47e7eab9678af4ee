"""Knowledge <-> a reply of plain arrays and a header, and every check that a reply must pass.

Nothing here trusts the sender: shapes are compared, never broadcast; dtypes are compared, never
cast; numbers must be finite and bounded; run, round, images and class map must be ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Knowledge, Teacher
from fedkd.knowledge.query import Answers, Header, HeaderValue, Query, Refused, Reply

PROTOCOL = 1


def pack(knowledge: Knowledge, query: Query, before: Answers | None = None) -> Reply:
    """The reply to a query, ready to be put into any transport's records.

    Args:
        knowledge: The teacher's answers about all images.
        query: What is asked.
        before: The client's answers of round `query.base`, as the server decoded them; without
            them everything is sent.
    """
    teacher = knowledge.teacher
    arrays = {
        str(kind): query.codec.encode(
            query.part(kind, knowledge.tensors[kind].cpu().numpy().astype(np.float32)),
            logits=kind.logits,
            before=None if before is None else query.part(kind, before[kind]),
        )
        for kind in query.kinds
    }
    header: dict[str, HeaderValue] = {
        "protocol": PROTOCOL,
        "run": query.run,
        "round": query.round,
        "client": teacher.number,
        "fingerprint": query.fingerprint,
        "class_map": query.class_map,
    }
    if before is not None:
        header["base"] = query.base
    if "num_examples" in query.disclose and teacher.num_examples is not None:
        header["num_examples"] = teacher.num_examples
    if "class_counts" in query.disclose and teacher.class_counts is not None:
        header["class_counts"] = list(teacher.class_counts)
    return Reply(arrays, header)


def unpack(reply: Reply, query: Query, client: int, before: Answers | None = None) -> Knowledge:
    """Check a reply against its query and return it as knowledge.

    Args:
        reply: As sent.
        query: What was asked.
        client: Who sent it, as the server knows it.
        before: What the server holds of this client's answers of round `query.base`.

    Raises:
        Refused: with the first reason found.
    """
    _check_header(reply.header, query, client)
    names = {str(kind): kind for kind in query.kinds}
    if set(reply.arrays) != set(names):
        missing = sorted(set(names) - set(reply.arrays))
        extra = sorted(set(reply.arrays) - set(names))
        raise Refused(f"kinds differ from the query: missing {missing}, unasked {extra}")
    held = before if reply.header.get("base") else None
    tensors = {}
    for name, kind in names.items():
        last = None if held is None else query.part(kind, held[kind])
        array = _check_array(name, kind, reply.arrays[name], query, last)
        if query.index is not None and kind.per_sample:
            if before is None:
                raise Refused(f"{name}: a part of the samples, but nothing is held of the rest")
            whole = np.array(before[kind])
            whole[query.index] = array
            array = whole
        tensors[kind] = torch.from_numpy(array)
    return Knowledge(_check_teacher(reply.header, query, client), tensors)


def _check_header(header: Header, query: Query, client: int) -> None:
    checks: Sequence[tuple[str, object, str]] = (
        ("protocol", PROTOCOL, "uses protocol {got}, this server uses {want}"),
        ("run", query.run, "answers run {got!r}, this is run {want!r}"),
        ("round", query.round, "answers round {got} (replayed or late), this is round {want}"),
        ("client", client, "claims to be client {got}, registered as client {want}"),
        ("fingerprint", query.fingerprint, "has {images} set {got!r}, expected {want!r}"),
        ("class_map", query.class_map, "has class map {got!r}, expected {want!r}"),
    )
    for key, want, message in checks:
        got = header.get(key)
        if got != want:
            raise Refused(message.format(got=got, want=want, images=query.images))
    base = header.get("base", 0)
    if base not in (0, query.base):
        raise Refused(
            f"sends changes since round {base}, the server holds its answers of round {query.base}"
        )


def _check_array(
    name: str, kind: Kind, sent: np.ndarray, query: Query, before: np.ndarray | None
) -> np.ndarray:
    shape = query.shapes[kind]
    if kind.per_sample:
        rows = query.num_samples if query.index is None else len(query.index)
        shape = (rows, *shape)
    same_samples = kind.logits and sent.ndim == len(shape) and sent.shape[0] == shape[0]
    if same_samples and sent.shape[1] != shape[1]:
        raise Refused(f"{name}: {sent.shape[1]} classes per sample, expected {shape[1]}")
    try:
        array = query.codec.decode(sent, shape, logits=kind.logits, before=before)
    except ValueError as error:
        plain = sent.shape == shape and np.issubdtype(sent.dtype, np.floating)
        if not plain or np.isfinite(sent).all():
            raise Refused(f"{name}: {error}") from None
        array = sent  # a codec of bytes shows what is no number as it is
    finite = np.isfinite(array)
    if not finite.all():
        what = "NaN" if np.isnan(array).any() else "infinity"
        raise Refused(f"{name}: {what} in {int((~finite).sum())} of {array.size} numbers")
    largest = float(np.abs(array).max(initial=0))
    if largest > query.max_abs:
        raise Refused(f"{name}: magnitude {largest:.3g}, at most {query.max_abs:g} is believed")
    return np.ascontiguousarray(array).reshape(shape)


def _check_teacher(header: Header, query: Query, client: int) -> Teacher:
    examples: int | None = None
    counts: tuple[int, ...] | None = None
    if "num_examples" in query.disclose:
        value = header.get("num_examples")
        if type(value) is not int or value < 0:  # True is an int, and no count
            raise Refused(f"num_examples is {value!r}, expected a count")
        examples = value
    if "class_counts" in query.disclose:
        value = header.get("class_counts")
        if (
            not isinstance(value, list)
            or len(value) != query.num_classes
            or any(type(n) is not int or n < 0 for n in value)
        ):
            raise Refused(f"class_counts is not {query.num_classes} counts")
        counts = tuple(value)
    return Teacher(client, examples, counts, query.parameters, knows=query.knows)
