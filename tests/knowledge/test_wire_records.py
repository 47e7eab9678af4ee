"""Arrays that claim to be larger than they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedkd.knowledge.wire import Refused
from strategies.records import KNOWLEDGE, knowledge_records, read_knowledge


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (3,)])
def test_room_is_made_only_for_what_came(shape: tuple[int, ...]) -> None:
    """numpy would allocate what the header says before it looks at the data."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    data = buffer.getvalue() + bytes(8)
    content = knowledge_records({"logits": np.ones(2, np.float32)}, {"round": 1})
    content[KNOWLEDGE] = ArrayRecord(
        {"logits": Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=data)}
    )
    with pytest.raises(Refused, match=r"logits: cannot be decoded .* announced, 8 there"):
        read_knowledge(content, 1e6)
