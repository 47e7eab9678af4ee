"""Knowledge <-> plain arrays and a header, and every check a payload must pass.

Nothing here trusts the sender: shapes are compared, never broadcast; dtypes are compared, never
cast; numbers must be finite and bounded; run, round, transfer set and class map must be ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedkd.knowledge.codecs.base import Codec
from fedkd.knowledge.codecs.float16 import Float16
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Knowledge, Teacher

PROTOCOL = 1

HeaderValue = int | str | list[int]
Header = Mapping[str, HeaderValue]


class Refused(ValueError):
    """A payload that must not be used; the message is the reason shown in the report."""


@dataclass(frozen=True)
class Expected:
    """What an acceptable payload of this round looks like.

    Attributes:
        run: Identity of the run (not Flower's: it survives a resume).
        round: Round number, from 1.
        fingerprint: Hash of the transfer set.
        class_map: Hash of the class names in order.
        num_samples: N, size of the transfer set.
        num_classes: C.
        shapes: Kinds that were ordered, each with the shape of a sample's entry (of a fact: of
            the whole) from this client's network.
        codec: How numbers are written.
        max_abs: Largest magnitude believed.
        disclose: Metadata that was asked for: `num_examples`, `class_counts`.
        parameters: Size of this client's network.
        base: The last round before this one whose answer the server holds from this client (0 if
            there is none): a codec that sends changes sends those since then.
        index: Samples that are asked about, sorted; None for all. Of the others the server keeps
            what it holds of round `base`.
    """

    run: str
    round: int
    fingerprint: str
    class_map: str
    num_samples: int
    num_classes: int
    shapes: Mapping[Kind, tuple[int, ...]]
    codec: Codec = field(default_factory=Float16)
    max_abs: float = 1e4
    disclose: tuple[str, ...] = ()
    parameters: int | None = None
    base: int = 0
    index: np.ndarray | None = field(default=None, compare=False)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds that were ordered."""
        return tuple(self.shapes)

    def asked(self, kind: Kind, values: np.ndarray) -> np.ndarray:
        """Of what is said of a kind, the part that travels."""
        return values if self.index is None or not kind.per_sample else values[self.index]


Answers = Mapping[Kind, np.ndarray]
"""What a client has said of every kind, as the server decoded it."""


def pack(
    knowledge: Knowledge, expected: Expected, before: Answers | None = None
) -> tuple[dict[str, np.ndarray], dict[str, HeaderValue]]:
    """Arrays by kind name and the header, ready to be put into any transport's records.

    Args:
        knowledge: What the teacher says.
        expected: This round's order.
        before: The client's answers of round `expected.base`, as the server decoded them; without
            them everything is sent.
    """
    teacher = knowledge.teacher
    arrays = {
        str(kind): expected.codec.encode(
            expected.asked(kind, knowledge.tensors[kind].cpu().numpy().astype(np.float32)),
            logits=kind.logits,
            before=None if before is None else expected.asked(kind, before[kind]),
        )
        for kind in expected.kinds
    }
    header: dict[str, HeaderValue] = {
        "protocol": PROTOCOL,
        "run": expected.run,
        "round": expected.round,
        "client": teacher.client,
        "fingerprint": expected.fingerprint,
        "class_map": expected.class_map,
    }
    if before is not None:
        header["base"] = expected.base
    if "num_examples" in expected.disclose and teacher.num_examples is not None:
        header["num_examples"] = teacher.num_examples
    if "class_counts" in expected.disclose and teacher.class_counts is not None:
        header["class_counts"] = list(teacher.class_counts)
    return arrays, header


def unpack(
    arrays: Mapping[str, np.ndarray],
    header: Header,
    expected: Expected,
    client: int,
    before: Answers | None = None,
) -> Knowledge:
    """Check a payload against what was ordered and return it as knowledge.

    Args:
        arrays: By kind name, as sent.
        header: As sent.
        expected: This round's order.
        client: Who sent it, as the server knows it.
        before: What the server holds of this client's answers of round `expected.base`.

    Raises:
        Refused: with the first reason found.
    """
    _check_header(header, expected, client)
    names = {str(kind): kind for kind in expected.kinds}
    if set(arrays) != set(names):
        missing, extra = sorted(set(names) - set(arrays)), sorted(set(arrays) - set(names))
        raise Refused(f"kinds differ from the order: missing {missing}, unasked {extra}")
    held = before if header.get("base") else None
    tensors = {}
    for name, kind in names.items():
        last = None if held is None else expected.asked(kind, held[kind])
        told = _check_array(name, kind, arrays[name], expected, last)
        if expected.index is not None and kind.per_sample:
            if before is None:
                raise Refused(f"{name}: a part of the samples, but nothing is held of the rest")
            whole = np.array(before[kind])
            whole[expected.index] = told
            told = whole
        tensors[kind] = torch.from_numpy(told)
    return Knowledge(_check_teacher(header, expected, client), tensors)


def _check_header(header: Header, expected: Expected, client: int) -> None:
    checks: Sequence[tuple[str, object, str]] = (
        ("protocol", PROTOCOL, "speaks protocol {got}, this server speaks {want}"),
        ("run", expected.run, "answers run {got!r}, this is run {want!r}"),
        ("round", expected.round, "answers round {got} (replayed or late), this is round {want}"),
        ("client", client, "claims to be client {got}, registered as client {want}"),
        ("fingerprint", expected.fingerprint, "has transfer set {got!r}, expected {want!r}"),
        ("class_map", expected.class_map, "has class map {got!r}, expected {want!r}"),
    )
    for key, want, message in checks:
        got = header.get(key)
        if got != want:
            raise Refused(message.format(got=got, want=want))
    base = header.get("base", 0)
    if base not in (0, expected.base):
        raise Refused(
            f"sends changes since round {base}, the server holds its answers of round "
            f"{expected.base}"
        )


def _check_array(
    name: str, kind: Kind, sent: np.ndarray, expected: Expected, before: np.ndarray | None
) -> np.ndarray:
    shape = expected.shapes[kind]
    if kind.per_sample:
        rows = expected.num_samples if expected.index is None else len(expected.index)
        shape = (rows, *shape)
    same_samples = kind.logits and sent.ndim == len(shape) and sent.shape[0] == shape[0]
    if same_samples and sent.shape[1] != shape[1]:
        raise Refused(f"{name}: {sent.shape[1]} classes per sample, expected {shape[1]}")
    try:
        array = expected.codec.decode(sent, shape, logits=kind.logits, before=before)
    except ValueError as error:
        if sent.shape != shape or not np.issubdtype(sent.dtype, np.floating):
            raise Refused(f"{name}: {error}") from None
        if np.isfinite(sent).all():
            raise Refused(f"{name}: {error}") from None
        array = sent  # a codec of bytes shows what is no number as it is
    finite = np.isfinite(array)
    if not finite.all():
        what = "NaN" if np.isnan(array).any() else "infinity"
        raise Refused(f"{name}: {what} in {int((~finite).sum())} of {array.size} numbers")
    largest = float(np.abs(array).max(initial=0))
    if largest > expected.max_abs:
        raise Refused(f"{name}: magnitude {largest:.3g}, at most {expected.max_abs:g} is believed")
    return np.ascontiguousarray(array).reshape(shape)


def _check_teacher(header: Header, expected: Expected, client: int) -> Teacher:
    examples: int | None = None
    counts: tuple[int, ...] | None = None
    if "num_examples" in expected.disclose:
        value = header.get("num_examples")
        if type(value) is not int or value < 0:  # True is an int, and no count
            raise Refused(f"num_examples is {value!r}, expected a count")
        examples = value
    if "class_counts" in expected.disclose:
        value = header.get("class_counts")
        if (
            not isinstance(value, list)
            or len(value) != expected.num_classes
            or any(type(n) is not int or n < 0 for n in value)
        ):
            raise Refused(f"class_counts is not {expected.num_classes} counts")
        counts = tuple(value)
    return Teacher(client, examples, counts, expected.parameters)
