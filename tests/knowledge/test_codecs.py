"""Every codec: what comes back, what it costs, and what damaged bytes cannot do."""

from __future__ import annotations

import lzma
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.base import Codec, centred, squeeze, unsqueeze
from fedkd.knowledge.codecs.delta import Delta
from fedkd.knowledge.codecs.topk import TopK
from fedkd.knowledge.codecs.vote import Vote

CASES: list[tuple[str, dict[str, Any]]] = [
    ("float32", {}),
    ("float16", {}),
    ("int", {}),
    ("int", {"bits": 4}),
    ("int", {"bits": 2}),
    ("topk", {}),
    ("vote", {}),
    ("delta", {}),
    ("delta", {"inner": "float16"}),
    ("delta", {"inner": {"name": "vote", "confidence": 0.8}}),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def codec(request: pytest.FixtureRequest) -> Codec:
    name, options = request.param
    return CODECS.create(name, **options)


def _logits(rows: int = 50, classes: int = 7, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


@pytest.mark.parametrize("shape", [(50, 7), (1, 2), (3, 1), (5,), (4, 2, 3, 3), (0, 4), ()])
def test_other_kinds_come_back_within_the_bound(codec: Codec, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    back = codec.decode(codec.encode(values), shape)
    assert back.dtype in (np.float16, np.float32)
    assert back.shape == shape
    assert np.abs(back - values).max(initial=0.0) <= codec.error(values)


@pytest.mark.smoke
def test_logits_come_back_within_the_bound_and_with_their_winner(codec: Codec) -> None:
    values = _logits()
    back = codec.decode(codec.encode(values, logits=True), values.shape, logits=True)
    back = back.astype(np.float32)
    assert np.abs(centred(back) - centred(values)).max() <= codec.error(values, logits=True)
    if not isinstance(codec, Vote) and codec.error(values, logits=True) < 0.1:
        assert (back.argmax(1) == values.argmax(1)).mean() > 0.95


def test_the_same_numbers_give_the_same_bytes(codec: Codec) -> None:
    one, two = codec.encode(_logits(), logits=True), codec.encode(_logits(), logits=True)
    assert one.tobytes() == two.tobytes()


def test_a_constant_in_every_row_changes_nothing_for_eight_bits() -> None:
    codec, values = CODECS.create("int"), np.round(_logits(), 2)
    shifted = values + np.float32(64)
    one, two = (codec.decode(codec.encode(v, logits=True), v.shape, logits=True)
                for v in (values, shifted))  # fmt: skip
    assert np.abs(one - two).max() <= 12 / 255 + 1e-6


def test_fewer_bits_are_fewer_bytes() -> None:
    values = _logits(1000, 10)
    sizes = [
        CODECS.create(name, **options).encode(values, logits=True).nbytes
        for name, options in CASES[:5] + CASES[6:7]
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 40_000
    assert sizes[3] < 5_100
    assert sizes[-1] < 700


def test_topk_keeps_probabilities_up_to_the_mass_outside() -> None:
    values, codec = _logits(200, 10, scale=2.0), TopK(k=4)
    back = codec.decode(codec.encode(values, logits=True), values.shape, logits=True)

    def softmax(rows: np.ndarray) -> np.ndarray:
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    true, found = softmax(values), softmax(back)
    outside = 1 - np.sort(true, axis=1)[:, -4:].sum(axis=1)
    gap = np.abs(true - found).sum(axis=1) / 2
    assert (gap <= outside + 0.05).all()
    assert (found.argmax(1) == true.argmax(1)).mean() > 0.99


def test_a_vote_has_the_stated_confidence() -> None:
    values = _logits(20, 5)
    codec = Vote(confidence=0.8)
    back = codec.decode(codec.encode(values, logits=True), values.shape, logits=True)
    probabilities = np.exp(back) / np.exp(back).sum(axis=1, keepdims=True)
    assert probabilities.max(axis=1) == pytest.approx(0.8)
    assert (back.argmax(1) == values.argmax(1)).all()


@pytest.mark.parametrize("inner", ["int", "float16", "vote", "topk"])
def test_what_has_not_changed_is_not_sent(inner: str) -> None:
    codec = Delta(inner=inner)
    first = _logits(1000, 10)
    held = codec.decode(codec.encode(first, logits=True), first.shape, logits=True)
    again = codec.encode(first, logits=True, before=held)
    assert again.nbytes < 40
    back = codec.decode(again, first.shape, logits=True, before=held)
    assert np.array_equal(back, held)
    second = first.copy()
    second[:10] += 5 * np.eye(10, dtype=np.float32)
    some = codec.encode(second, logits=True, before=held)
    assert some.nbytes < codec.encode(second, logits=True).nbytes / 5
    whole = codec.decode(codec.encode(second, logits=True), second.shape, logits=True)
    assert np.array_equal(codec.decode(some, first.shape, logits=True, before=held), whole)


def test_small_changes_are_not_worth_sending_and_never_add_up() -> None:
    """A drift of a hundredth per round: what is held is never further off than the tolerance."""
    codec = Delta(inner="float32", tolerance=0.1)
    values = np.zeros((4, 3), np.float32)
    held = codec.decode(codec.encode(values), values.shape)
    sent = 0
    for _ in range(50):
        values[0, 0] += np.float32(0.01)
        message = codec.encode(values, before=held)
        sent += message.nbytes > 10
        held = codec.decode(message, values.shape, before=held)
        assert np.abs(held - values).max() <= 0.1 + 1e-5
    assert 3 <= sent <= 6


def test_delta_without_its_base_is_an_error_not_a_guess() -> None:
    codec = Delta()
    values = _logits()
    held = codec.decode(codec.encode(values), values.shape)
    message = codec.encode(values, before=held)
    with pytest.raises(ValueError, match="last time"):
        codec.decode(message, values.shape)
    with pytest.raises(ValueError, match="inner"):
        Delta(inner="delta")


@pytest.mark.parametrize("pack", [zlib.compress, lzma.compress])
def test_a_bomb_is_not_unpacked(pack: Any) -> None:
    bomb = b"z" + zlib.compress(bytes(50_000_000))
    with pytest.raises(ValueError, match="more than 100 bytes"):
        unsqueeze(np.frombuffer(bomb, np.uint8), 100)
    assert unsqueeze(squeeze(bytes(100)), 100) == bytes(100)


def test_numbers_that_are_none_travel_openly_to_be_refused(codec: Codec) -> None:
    values = _logits()
    values[3, 2] = np.nan
    sent = codec.encode(values, logits=True)
    assert np.isnan(np.asarray(sent, dtype=np.float64)).any()


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), case=st.sampled_from(CASES), logits=st.booleans())
def test_any_bytes_give_numbers_or_a_value_error(
    data: bytes, case: tuple[str, dict[str, Any]], logits: bool
) -> None:
    codec = CODECS.create(case[0], **case[1])
    _survives(codec, np.frombuffer(data, np.uint8), logits)


@settings(max_examples=150, deadline=None)
@given(
    place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000),
    case=st.sampled_from(CASES[2:]), logits=st.booleans(),
)  # fmt: skip
def test_damaged_messages_give_numbers_or_a_value_error(
    place: int, value: int, cut: int, case: tuple[str, dict[str, Any]], logits: bool
) -> None:
    codec = CODECS.create(case[0], **case[1])
    sent = codec.encode(_logits(9, 5), logits=logits).copy()
    sent[place % len(sent)] = value
    _survives(codec, sent, logits)
    _survives(codec, sent[: cut % len(sent)], logits)


def _survives(codec: Codec, sent: np.ndarray, logits: bool) -> None:
    try:
        back = codec.decode(sent, (9, 5), logits=logits, before=np.zeros((9, 5), np.float32))
    except ValueError:
        return
    assert back.shape == (9, 5)
