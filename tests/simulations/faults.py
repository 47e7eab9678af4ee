"""Client apps that misbehave: real Flower mods around the real client app."""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd.knowledge.query import Images, Reply
from fedkd.simulations.client_app import make_client_app
from fedkd.strategies.records import JOB, read_replies, reply_records

Tamper = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def _set(value: float) -> Tamper:
    def tamper(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        arrays["logits"][0, 0] = value

    return tamper


def _replace(make: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    def tamper(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        arrays["logits"] = make(arrays["logits"])

    return tamper


def _replay(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    header["round"] -= 1


# name -> (what is done to the payload, a part of the reason that must be reported)
BAD_PAYLOADS: dict[str, tuple[Tamper, str]] = {
    "nan": (_set(np.nan), "NaN in 1 of"),
    "infinity": (_set(np.inf), "infinity in 1 of"),
    "1e30": (_set(1e30), "1e+30"),
    "broadcast": (_replace(lambda a: a[:1]), "shape (1, 4), expected (48, 4)"),
    "class count": (_replace(lambda a: a[:, :3]), "3 classes per sample, expected 4"),
    "replay": (_replay, "replayed or late"),
}


def tampering(tampers: Mapping[int, Tamper]) -> ClientApp:
    """The real client app, with the knowledge of some clients (by number) tampered with."""

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query.knowledge" and client in tampers:
            read = read_replies(reply.content, math.inf)[Images.TRANSFER]
            arrays = {name: array.copy() for name, array in read.arrays.items()}
            header = dict(read.header)
            tampers[client](arrays, header)
            reply.content.update(reply_records(Images.TRANSFER, Reply(arrays, header)))
        return reply

    return make_client_app([mod])


def crashing(client: int, message_type: str, round_number: int) -> ClientApp:
    """One client raises when asked for `message_type` in one round."""

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        mine = int(context.node_config["partition-id"]) == client
        now = message.content.config_records[JOB]["round"] == round_number
        if mine and now and message.metadata.message_type == message_type:
            raise OSError("the disk is full")
        return call_next(message, context)

    return make_client_app([mod])


def killed_once(flag: Path, client: int = 1) -> ClientApp:
    """The process that trains `client` is killed (as the kernel does when memory is short)."""
    path = str(flag)

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        mine = int(context.node_config["partition-id"]) == client
        if mine and message.metadata.message_type == "train" and not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return call_next(message, context)

    return make_client_app([mod])


def slow(client: int, seconds: float) -> ClientApp:
    """One client takes its time to train in round 1."""

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        mine = int(context.node_config["partition-id"]) == client
        first = message.content.config_records[JOB]["round"] == 1
        if mine and first and message.metadata.message_type == "train":
            time.sleep(seconds)
        return call_next(message, context)

    return make_client_app([mod])
