"""Messages: what is sent, what comes back when, and what a damaged reply costs."""

import io
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedkd.knowledge.query import Images, Refused, Reply
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.local import LocalGrid
from fedkd.strategies import messaging as module
from fedkd.strategies.messaging import Delivery, exchanged
from fedkd.strategies.records import (
    arrays_name,
    explain,
    header_name,
    read_replies,
    reply_records,
    wire_bytes,
)

TRANSFER = Images.TRANSFER


class SlowGrid(LocalGrid):
    """Replies become visible in reverse order, some never."""

    def __init__(self, order: list[int], lost: set[int] = frozenset()) -> None:
        super().__init__(make_client_app(), 1)
        self.order, self.lost = order, lost
        self.sent: dict[str, int] = {}
        self.peak = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            identity = f"m{message.metadata.dst_node_id}"
            self.sent[identity] = message.metadata.dst_node_id
            self._replies[identity] = message
            identities.append(identity)
        self.peak = max(self.peak, len(self._replies))
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = []
        for identity in message_ids:
            node = self.sent[identity]
            due = [n for n in self.order if f"m{n}" in self._replies and n not in self.lost]
            if due and node == due[0]:
                ready.append(self._replies.pop(identity))
        return ready


def messages(nodes: Iterable[int]) -> dict[int, Any]:
    def make(node: int) -> Message:
        return Message(RecordDict(), dst_node_id=node, message_type="train", ttl=5.0)

    return {node: (lambda node=node: make(node)) for node in nodes}


def replies_of(grid: SlowGrid, **options: Any) -> list[Delivery]:
    asked = exchanged(grid, messages(range(len(grid.order))), **options)
    return [reply for reply in asked if reply is not None]


def test_replies_come_as_they_arrive_each_once() -> None:
    replies = replies_of(SlowGrid(order=[3, 1, 2, 0]), deadline=5)
    assert [reply.client for reply in replies] == [3, 1, 2, 0]


def test_no_more_than_the_window_is_under_way() -> None:
    grid = SlowGrid(order=list(range(20)))
    assert len(replies_of(grid, deadline=5, window=3)) == 20
    assert grid.peak == 3


def test_a_silent_node_is_given_up_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    grid = SlowGrid(order=[0, 1, 2], lost={1})
    started = time.monotonic()
    replies = {reply.client: reply.message for reply in replies_of(grid, deadline=0.1)}
    assert time.monotonic() - started < 5
    assert replies[1] is None
    assert replies[0] is not None
    assert replies[2] is not None


def records() -> RecordDict:
    return reply_records(
        TRANSFER, Reply({"logits": np.ones((5, 4), np.float16)}, {"run": "r", "round": 1})
    )


@pytest.mark.smoke
def test_records_come_back_as_they_were() -> None:
    reply = read_replies(records(), 1e6)[TRANSFER]
    assert np.array_equal(reply.arrays["logits"], np.ones((5, 4), np.float16))
    assert reply.header == {"run": "r", "round": 1}


def test_size_is_checked_before_anything_is_decoded() -> None:
    with pytest.raises(Refused, match="payload of 168 bytes, at most 100 are accepted"):
        read_replies(records(), 100)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (b"", "float16", (5, 4)),
        (b"junk", "float16", (5, 4)),
        (b"\x93NUMPY\x01\x00" + b"\xff" * 20, "float16", (5, 4)),
        (np.ones(3).tobytes(), "float16", (5, 4)),
        (pickled(), "object", (1,)),
    ],
)
def test_a_damaged_or_pickled_array_is_refused(
    data: bytes, dtype: str, shape: tuple[int, ...]
) -> None:
    content = records()
    array = Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)
    content[arrays_name(TRANSFER)] = ArrayRecord({"logits": array})
    with pytest.raises(Refused, match="logits: cannot be decoded"):
        read_replies(content, 1e6)


def test_a_reply_without_knowledge_is_refused() -> None:
    with pytest.raises(Refused, match="no knowledge in the reply"):
        read_replies(RecordDict({"other": ConfigRecord()}), 1e6)
    content = records()
    del content[header_name(TRANSFER)]
    with pytest.raises(Refused, match="answers about transfer images without a header"):
        read_replies(content, 1e6)


@pytest.mark.smoke
def test_bytes_are_those_of_the_serialised_message() -> None:
    grid = LocalGrid(make_client_app(), 1)
    assert grid is not None  # sets the process's task, which Flower stamps on messages
    sizes = []
    for number in (100, 200):
        reply = Reply({"logits": np.ones((number, 4), np.float16)}, {"round": 1})
        content = reply_records(TRANSFER, reply)
        sizes.append(wire_bytes(Message(content, dst_node_id=1, message_type="train")))
    assert sizes[1] - sizes[0] == pytest.approx(100 * 4 * 2, abs=16)
    assert sizes[0] - 800 < 1500


def test_an_error_is_told_in_one_plain_line() -> None:
    reason = (
        "\x1b[36mray::ClientAppActor.run()\x1b[39m\nTraceback (most recent call last):\n"
        '  File "x.py", line 1\nOSError: the disk is full\n'
    )
    assert explain(reason) == "OSError: the disk is full"
    assert explain("") == "no reason given"
