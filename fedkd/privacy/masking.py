"""Masks that cancel in a sum: every pair of clients agrees on one, one adds it, one subtracts it.

X25519 key agreement with fresh keys for every sum, HKDF-SHA256 to a key for the pair, ChaCha20 for
as many numbers modulo 2^32 as there are. The pair's key is bound to the whole roster of the sum:
masks cancel between clients who were given the same roster, and between no others. So a server
that deals different rosters gets random numbers, and one that leaves somebody's vector out too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from fedkd.io.extras import extra

KEY_BYTES = 32


def _x25519() -> ModuleType:
    with extra("privacy", "secure aggregation"):
        from cryptography.hazmat.primitives.asymmetric import x25519
    return x25519


def key_pair() -> tuple[bytes, bytes]:
    """A fresh private key and its public key, from the operating system's randomness."""
    private = _x25519().X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public key of a private one."""
    own = _x25519().X25519PrivateKey.from_private_bytes(private)
    public: bytes = own.public_key().public_bytes_raw()
    return public


def roster_digest(run: str, round_number: int, attempt: int, keys: Mapping[int, bytes]) -> bytes:
    """What the masks of a sum are bound to: who is in it, with which keys, and when."""
    known = [[client, keys[client].hex()] for client in sorted(keys)]
    text = json.dumps([run, round_number, attempt, known])
    return hashlib.sha256(b"fedkd secure sum\n" + text.encode()).digest()


def masked(
    values: np.ndarray, client: int, private: bytes, keys: Mapping[int, bytes], roster: bytes
) -> np.ndarray:
    """`values` plus this client's masks modulo 2^32, uint32.

    Args:
        values: uint32 (n,).
        client: Whose they are.
        private: Its key, for this sum only.
        keys: Client -> public key, of all in the sum.
        roster: As `roster_digest` gives it.

    Raises:
        ValueError: a public key with which nothing secret can be agreed on.
    """
    with extra("privacy", "secure aggregation"):
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    curve = _x25519()
    own = curve.X25519PrivateKey.from_private_bytes(private)
    out: np.ndarray = values.astype(np.uint32)
    for other in sorted(keys):
        if other == client:
            continue
        shared = own.exchange(curve.X25519PublicKey.from_public_bytes(keys[other]))
        pair = b"fedkd mask\n" + roster + json.dumps(sorted((client, other))).encode()
        key = HKDF(SHA256(), 32, None, pair).derive(shared)
        # A key is used once, so the nonce need not differ.
        stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * len(out)))
        mask = np.frombuffer(stream, "<u4")
        out = out + mask if client < other else out - mask
    return out
