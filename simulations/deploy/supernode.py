"""Flower's SuperNode, made to run accepted apps only.

`supernode.sh` calls it with the settings of the node in its environment.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.supernode import start_client_internal as flower

from fedkd.config import ConfigError
from fedkd.simulations.deploy.apps import app_hash, read_apps
from fedkd.simulations.deploy.quoting import quoted

INVALID_FAB = 7  # flwr.common.constant.ErrorCode, which is not public
PULL = "_pull_and_store_message"
_NEEDS = {"state", "object_store", "receive", "get_fab"}


class AppRefused(Exception):
    """A run comes with code that the node's owner has not accepted."""


def run(settings: Mapping[str, str], folder: Path) -> None:
    """Be a SuperNode until the process is ended.

    Raises:
        ConfigError: a setting is missing or wrong.
    """
    arguments = arguments_of(settings, folder)
    guard(read_apps(settings.get("APPS", "")))
    from flwr.supernode.cli import flower_supernode

    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


def arguments_of(settings: Mapping[str, str], folder: Path) -> list[str]:
    """The words of `flower-supernode` for these settings."""
    missing = [name for name in ("SUPERLINK", "PARTITION_ID", "NUM_PARTITIONS", "STATE", "POLICY")
               if not settings.get(name)]  # fmt: skip
    if missing:
        raise ConfigError(f"settings.env: {missing[0]} is missing")
    for name in ("PARTITION_ID", "NUM_PARTITIONS"):
        if not settings[name].isdecimal():
            raise ConfigError(f"{name} in settings.env: expected a number, got {settings[name]!r}")
    paths = {
        "state-dir": settings["STATE"],
        "policy": settings["POLICY"],
        "key": settings.get("KEY") or "node.key",
        "data": settings.get("DATA", ""),
        "data-root": settings.get("DATA_ROOT", ""),
        "peers": settings.get("PEERS", ""),
    }
    config = {
        "partition-id": settings["PARTITION_ID"],
        "num-partitions": settings["NUM_PARTITIONS"],
        **{
            name: quoted(str(folder / Path(path).expanduser()))
            for name, path in paths.items()
            if path
        },
    }
    return [
        "--superlink", settings["SUPERLINK"],
        "--root-certificates", str(folder / "ca.crt"),
        "--auth-supernode-private-key", str(folder / Path(paths["key"]).expanduser()),
        "--host", "127.0.0.1",
        "--port", settings.get("RUNTIME_PORT") or "9094",
        "--node-config", " ".join(f"{name}={value}" for name, value in config.items()),
    ]  # fmt: skip


def guard(accepted: Collection[str]) -> None:
    """Make this process's SuperNode refuse every app but these, before any of it is unpacked.

    Raises:
        ConfigError: Flower is built otherwise than expected: rather no node than an open one.
    """
    pull = getattr(flower, PULL, None)
    if (
        pull is None
        or not set(inspect.signature(pull).parameters) >= _NEEDS
        or PULL not in flower.start_client_internal.__code__.co_names
        or not hasattr(flower, "_insert_message")
    ):
        raise ConfigError(
            "this version of Flower cannot be kept from running any app: install the server's "
            "(flwr>=1.41,<1.43)"
        )
    setattr(flower, PULL, _guarded(pull, frozenset(accepted)))


def _guarded(pull: Callable[..., int | None], accepted: frozenset[str]) -> Callable[..., Any]:
    def guarded(
        *, receive: Callable[[], Any], get_fab: Callable[[str, int], Any], **rest: Any
    ) -> int | None:
        received: list[Message] = []

        def remember() -> Any:
            answer = receive()
            if answer is not None:
                received[:] = [answer[0]]
            return answer

        def checked(name: str, run_id: int) -> Any:
            fab = get_fab(name, run_id)
            check_app(fab.content, fab.hash_str, accepted)
            return fab

        try:
            return pull(receive=remember, get_fab=checked, **rest)
        except AppRefused as refusal:
            (message,) = received
            print(f"refused: {refusal}", file=sys.stderr, flush=True)  # noqa: T201
            reply = Message(Error(INVALID_FAB, str(refusal)), reply_to=message)
            flower._insert_message(reply, rest["state"], rest["object_store"])
            return message.metadata.run_id

    return guarded


def check_app(bundle: bytes, name: str, accepted: Collection[str]) -> None:
    """Refuse a bundle whose content nobody accepted.

    Args:
        bundle: As the server sent it.
        name: Flower's hash of it, by which it is unpacked and loaded.
        accepted: Hashes of `app_hash`.

    Raises:
        AppRefused: with the hash that its owner would have to accept.
    """
    if hashlib.sha256(bundle).hexdigest() != name:
        raise AppRefused("the server's app is not the one it names")
    try:
        found = app_hash(bundle)
    except ValueError as error:
        raise AppRefused(f"the server's app: {error}") from None
    if found not in accepted:
        raise AppRefused(
            f"the server's app {found} is none of APPS in this node's settings.env: its owner may "
            "read it and accept it with `fedkd deploy accept`"
        )
