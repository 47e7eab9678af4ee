"""Arrays that claim to be larger than they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedkd.knowledge.query import HeaderValue, Images, Refused, Reply
from fedkd.strategies.records import arrays_name, read_replies, reply_records

TRANSFER = Images.TRANSFER
ARRAYS = arrays_name(TRANSFER)


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (3,)])
def test_room_is_made_only_for_what_came(shape: tuple[int, ...]) -> None:
    """numpy would allocate what the header says before it looks at the data."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    data = buffer.getvalue() + bytes(8)
    content = reply_records(TRANSFER, Reply({"logits": np.ones(2, np.float32)}, {"round": 1}))
    content[ARRAYS] = ArrayRecord(
        {"logits": Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=data)}
    )
    with pytest.raises(Refused, match=r"logits: cannot be decoded .* announced, 8 there"):
        read_replies(content, 1e6)


def test_coded_bytes_travel_without_an_array_around_them() -> None:
    coded = {"logits": np.arange(40, dtype=np.uint8), "virtual_logits": np.ones(7, np.uint8)}
    plain = {"density_ratio": np.ones((3, 1), np.float16), "square": np.ones((2, 2), np.uint8)}
    header: dict[str, HeaderValue] = {"protocol": 3, "run": "r", "class_counts": [1, 2]}
    for arrays in (coded, plain, coded | plain):
        content = reply_records(TRANSFER, Reply(arrays, header))
        assert (ARRAYS in content) == (arrays is not coded)
        reply = read_replies(content, 1e6)[TRANSFER]
        read = reply.arrays
        assert reply.header == header
        assert set(read) == set(arrays)
        assert all(np.array_equal(read[name], arrays[name]) for name in arrays)
        assert all(read[name].dtype == arrays[name].dtype for name in arrays)
    with pytest.raises(Refused, match="at most 46 are accepted"):
        read_replies(reply_records(TRANSFER, Reply(coded, header)), 46)


def test_a_name_that_is_there_twice_is_refused() -> None:
    content = reply_records(TRANSFER, Reply({"logits": np.ones(3, np.uint8)}, {"protocol": 3}))
    content[ARRAYS] = reply_records(TRANSFER, Reply({"logits": np.ones((1, 3), np.float16)}, {}))[
        ARRAYS
    ]
    with pytest.raises(Refused, match="logits: is there twice"):
        read_replies(content, 1e6)
