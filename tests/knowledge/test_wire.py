"""No payload is used before it has passed every check."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.knowledge.codecs.delta import Delta
from fedkd.knowledge.codecs.float16 import Float16
from fedkd.knowledge.codecs.float32 import Float32
from fedkd.knowledge.codecs.int import Int
from fedkd.knowledge.kinds import Logits, VirtualLogits
from fedkd.knowledge.payload import Knowledge, Teacher
from fedkd.knowledge.query import Images, Query, Refused, Reply
from fedkd.knowledge.wire import pack, unpack

QUERY = Query(
    images=Images.TRANSFER, run="run-1", round=2, fingerprint="f00d", class_map="c1a55",
    num_samples=6, num_classes=4,
    shapes={Logits(): (4,), VirtualLogits(0): (4,)}, disclose=("class_counts", "num_examples"),
)  # fmt: skip


def reply() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tensors = {
        kind: torch.randn(6, 4, generator=torch.Generator().manual_seed(n))
        for n, kind in enumerate(QUERY.kinds)
    }
    packed = pack(Knowledge(Teacher(3, 10, (1, 2, 3, 4)), tensors), QUERY)
    return dict(packed.arrays), dict(packed.header)


@pytest.mark.smoke
def test_what_is_packed_comes_back_to_half_precision() -> None:
    arrays, header = reply()
    knowledge = unpack(Reply(arrays, header), QUERY, 3)
    assert knowledge.teacher == Teacher(3, 10, (1, 2, 3, 4))
    assert knowledge.tensors[Logits()].dtype == torch.float16
    expected = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(knowledge.tensors[Logits()].float(), expected, atol=1e-3)


def test_only_what_was_asked_for_is_disclosed() -> None:
    tensors = {Logits(): torch.zeros(6, 4), VirtualLogits(0): torch.zeros(6, 4)}
    quiet = replace(QUERY, disclose=())
    header = pack(Knowledge(Teacher(3, 10, (1, 2, 3, 4)), tensors), quiet).header
    assert set(header) == {"protocol", "run", "round", "client", "fingerprint", "class_map"}


def change(name: str, value: Any) -> Callable[..., None]:
    return lambda arrays, header: header.__setitem__(name, value)


def number(value: float) -> Callable[..., None]:
    return lambda arrays, header: arrays["logits"].__setitem__((1, 2), value)


def array(make: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    return lambda arrays, header: arrays.__setitem__("logits", make(arrays["logits"]))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (number(np.nan), "logits: NaN in 1 of 24"),
        (number(np.inf), "logits: infinity in 1 of 24"),
        (number(-2e4), "logits: magnitude 2e\\+04, at most 10000"),
        (array(lambda a: a[:1]), "logits: shape \\(1, 4\\), expected \\(6, 4\\)"),
        (array(lambda a: a[:, :1]), "logits: 1 classes per sample, expected 4"),
        (array(lambda a: np.pad(a, ((0, 0), (0, 1)))), "5 classes per sample, expected 4"),
        (array(lambda a: a[None]), "shape \\(1, 6, 4\\)"),
        (array(lambda a: a.astype(np.float64)), "dtype float64, expected float16"),
        (array(lambda a: a.astype(object)), "dtype object"),
        (change("round", 1), "answers round 1 \\(replayed or late\\), this is round 2"),
        (change("run", "run-0"), "answers run 'run-0'"),
        (change("client", 4), "claims to be client 4, registered as client 3"),
        (change("fingerprint", "beef"), "has transfer set 'beef', expected 'f00d'"),
        (change("class_map", "x"), "has class map 'x'"),
        (change("protocol", 9), "uses protocol 9"),
        (change("num_examples", -1), "num_examples is -1"),
        (change("num_examples", True), "num_examples is True"),
        (change("class_counts", [1, 2, 3, True]), "class_counts is not 4 counts"),
        (change("class_counts", [1, 2, 3]), "class_counts is not 4 counts"),
        (change("class_counts", [1, 2, 3, -4]), "class_counts is not 4 counts"),
        (lambda a, h: h.pop("class_counts"), "class_counts is not 4 counts"),
        (lambda a, h: h.pop("round"), "answers round None"),
        (lambda a, h: a.pop("logits"), "missing \\['logits'\\]"),
        (lambda a, h: a.__setitem__("more", a["logits"]), "unasked \\['more'\\]"),
    ],
)
def test_a_bad_payload_is_refused_with_its_reason(tamper: Callable[..., Any], reason: str) -> None:
    arrays, header = reply()
    tamper(arrays, header)
    with pytest.raises(Refused, match=reason):
        unpack(Reply(arrays, header), QUERY, 3)


def test_1e30_is_refused_where_it_can_be_written() -> None:
    wide = replace(QUERY, codec=Float32(), shapes={Logits(): (4,)}, disclose=())
    tensors = {Logits(): torch.full((6, 4), 1e30)}
    packed = pack(Knowledge(Teacher(3), tensors), wide)
    with pytest.raises(Refused, match="magnitude 1e\\+30"):
        unpack(packed, wide, 3)
    half = replace(wide, codec=Float16())
    packed = pack(Knowledge(Teacher(3), tensors), half)
    with pytest.raises(Refused, match="infinity"):
        unpack(packed, half, 3)


DELTA = replace(QUERY, codec=Delta(inner="float16"), base=1, disclose=())


def _drawn(seed: int) -> Knowledge:
    drawn = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))
    return Knowledge(Teacher(3), dict(zip(QUERY.kinds, drawn)))


def test_changes_are_added_to_what_the_server_holds() -> None:
    first = _drawn(0)
    before = {kind: tensor.numpy() for kind, tensor in first.tensors.items()}
    changed = {kind: tensor.clone() for kind, tensor in first.tensors.items()}
    changed[Logits()][2] += torch.tensor([3.0, 0, 0, 0])
    packed = pack(Knowledge(Teacher(3), changed), DELTA, before)
    assert packed.header["base"] == 1
    knowledge = unpack(packed, DELTA, 3, before)
    for kind in QUERY.kinds:
        assert torch.allclose(knowledge.tensors[kind], changed[kind], atol=2e-3)


def test_changes_since_another_round_are_refused_and_everything_is_always_welcome() -> None:
    before = {kind: tensor.numpy() for kind, tensor in _drawn(0).tensors.items()}
    packed = pack(_drawn(1), DELTA, before)
    with pytest.raises(Refused, match=r"changes since round 1, .* round 2"):
        unpack(packed, replace(DELTA, base=2), 3, before)
    packed = pack(_drawn(1), DELTA)
    assert "base" not in packed.header
    knowledge = unpack(packed, replace(DELTA, base=2), 3, before)
    assert torch.allclose(knowledge.tensors[Logits()], _drawn(1).tensors[Logits()], atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codecs_of_bytes_name_what_is_no_number(value: float) -> None:
    small = replace(QUERY, codec=Int(), disclose=())
    bad = _drawn(0)
    bad.tensors[Logits()][1, 2] = value
    packed = pack(bad, small)
    with pytest.raises(Refused, match=r"logits: (NaN|infinity) in 1 of 24"):
        unpack(packed, small, 3)


def test_numbers_of_another_shape_or_codec_are_refused() -> None:
    small = replace(QUERY, codec=Int(), disclose=())
    packed = pack(_drawn(0), small)
    for wrong in (
        packed.arrays["logits"][:-3],
        np.zeros((6, 4), np.float32),
        np.zeros((6, 9), np.int64),
    ):
        with pytest.raises(Refused, match="logits"):
            unpack(Reply({"logits": wrong}, packed.header), small, 3)
