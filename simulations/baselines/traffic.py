"""What would travel: real Flower messages, and their size as Flower serialises them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity

from fedkd.models.network import Network
from fedkd.simulations.local import RUN_ID, SERVER_NODE
from fedkd.strategies.records import wire_bytes

Arrays = Mapping[str, np.ndarray]


class MessageMeter:
    """The messages of one round; the other end reads what the message carries.

    Attributes:
        round: From 1.
        up: Bytes from all clients so far.
        down: Bytes to all clients so far.
    """

    def __init__(self, round_number: int) -> None:
        # Flower stamps messages with the process's task; here nobody else has set it.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, 1, SERVER_NODE
        self.round = round_number
        self.up = self.down = 0

    def ask(self, client: int, arrays: Arrays | None = None, **config: float) -> Message:
        """A message to a client, with arrays or without."""
        content = RecordDict({"config": ConfigRecord({"server-round": self.round, **config})})
        if arrays:
            content["arrays"] = _record(arrays)
        # Node 0 does not exist in Flower.
        message = Message(content, dst_node_id=client + 1, message_type=MessageType.TRAIN)
        self.down += wire_bytes(message)
        return message

    def answer(self, request: Message, arrays: Arrays, num_examples: int | None = None) -> Message:
        """A client's reply; with its number of examples if the method needs it."""
        content = RecordDict({"arrays": _record(arrays)})
        if num_examples is not None:
            content["metrics"] = MetricRecord({"num-examples": num_examples})
        message = Message(content, reply_to=request)
        self.up += wire_bytes(message)
        return message


def read(message: Message) -> dict[str, np.ndarray]:
    """The arrays in a message; empty if there are none."""
    records = message.content.array_records
    return {} if "arrays" not in records else _plain(records["arrays"])


def weights(network: Network) -> dict[str, np.ndarray]:
    """A network's weights and buffers, but for the preprocessing, which both ends know."""
    return {name: value.cpu().numpy() for name, value in network.body.state_dict().items()}


def load(network: Network, arrays: Arrays | ArrayRecord) -> None:
    """Put `weights` into a network."""
    plain = plain_arrays(arrays)
    network.body.load_state_dict({k: torch.from_numpy(np.array(a)) for k, a in plain.items()})


def plain_arrays(arrays: Arrays | ArrayRecord) -> Arrays:
    """Arrays by name, out of a record if they are in one."""
    return _plain(arrays) if isinstance(arrays, ArrayRecord) else arrays


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _plain(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}
