"""Which client a node is: not what it says, but whose key it holds.

A server that knows the nodes' public keys (`nodes/node-K.pub` of a deployment) sends each node a
fresh challenge when it asks who it is. The node signs it, together with the run, its Flower id and
the number it claims, with the key it is registered with. In a simulation there are no keys, and
nothing is sent or signed.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkd.config import ConfigError
from fedkd.simulations.deploy.keys import public_key, sign, verify
from fedkd.strategies.records import SIGNATURE


def proof(key: Path, challenge: bytes, run: str, node: int, client: int) -> bytes:
    """A node's signature under what it claims.

    Raises:
        RuntimeError: `key` is missing or no private key.
    """
    return signature_of(key, _statement(challenge, run, node, client))


def signature_of(key: Path, data: bytes) -> bytes:
    """Signature of `data` with a node's key.

    Raises:
        RuntimeError: `key` is missing or no private key.
    """
    try:
        return sign(key.read_bytes(), data)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"KEY {key}: expected the node's private key ({error})") from None


class NodeKeys:
    """Public keys of a federation, by client number.

    Args:
        folder: Holds `node-0.pub`, `node-1.pub`, …; looked at again for who is not known yet.
        clients: How many there have to be already.

    Raises:
        ConfigError: a key is missing, is none, or is there twice.
    """

    def __init__(self, folder: Path, clients: int) -> None:
        self.folder = folder
        self._keys = self._read()
        missing = [str(number) for number in range(clients) if number not in self._keys]
        if missing:
            raise ConfigError(
                f"{folder}: expected node-K.pub of {clients} clients, client "
                f"{', '.join(missing[:10])} has none"
            )

    def _read(self) -> dict[int, bytes]:
        folder = self.folder
        keys: dict[int, bytes] = {}
        seen: dict[bytes, str] = {}
        for path in sorted(folder.glob("node-*.pub")):
            if (number := re.fullmatch(r"node-(\d+)", path.stem)) is None:
                continue
            try:
                key = public_key(path.read_bytes())
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: expected a node's public key ({error})") from None
            if key in seen:
                raise ConfigError(f"{path}: the key of {seen[key]}; each node has its own")
            seen[key] = path.name
            keys[int(number[1])] = key
        return keys

    def challenge(self) -> bytes:
        """Something to sign that nobody has signed yet."""
        return secrets.token_bytes(32)

    def problem(
        self, facts: Mapping[str, Any], challenge: bytes, run: str, node: int
    ) -> str | None:
        """Why a node is not the client it claims to be, or None if its key proves it."""
        client, signature = facts.get("client"), facts.get(SIGNATURE)
        try:
            self._look(client)
        except ConfigError as error:
            return f"claims to be client {client!r}; {error}"
        key = self._keys.get(client) if type(client) is int else None
        if key is None:
            return f"claims to be client {client!r}, who has no key in {self.folder}"
        if not isinstance(signature, bytes):
            return (
                f"claims to be client {client} and signs nothing: its KEY in settings.env has to "
                "name its node.key"
            )
        if not verify(key, signature, _statement(challenge, run, node, int(client or 0))):
            return f"claims to be client {client} without the key of node-{client}.pub"
        return None

    def signed(self, client: int, data: bytes, signature: bytes) -> bool:
        """Whether `signature` of `data` is by the client's key. Raises `ConfigError`."""
        self._look(client)
        key = self._keys.get(client)
        return key is not None and verify(key, signature, data)

    def _look(self, client: object) -> None:
        """Look again for one who has joined since."""
        if client not in self._keys:
            self._keys = self._read()


def _statement(challenge: bytes, run: str, node: int, client: int) -> bytes:
    """What is signed. No part of it can be taken for another, nor for what Flower signs."""
    return b"fedkd node\n" + json.dumps([challenge.hex(), run, node, client]).encode()
