"""A client's part of a secure sum: a fresh key, then its votes under noise and masks, once.

The server hands the keys round and is not trusted with it. A client answers only for enough
clients, each there once, each key signed by the client whose it is (where clients have keys of
their own to sign with), and under each of its own keys only once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedkd.privacy.masking import KEY_BYTES, masked, public_of, roster_digest
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.cells import Cells
from fedkd.rounds.client import Client

Signed = Callable[[int, bytes, bytes], bool]
"""Whether (client, data, signature) fit: the data are signed by that client."""


class SumRefused(RuntimeError):
    """A client does not answer: what the server handed round protects nobody."""


@dataclass(frozen=True)
class Roster:
    """Who is in a sum, as the server hands it to each of them.

    Attributes:
        attempt: Which sum of the round it is, from 1.
        keys: Client -> its key for this sum.
        signatures: Client -> its signature under that key; empty where nobody signs.
        cells: What is asked about; None: the images that the config says.
    """

    attempt: int
    keys: Mapping[int, bytes]
    signatures: Mapping[int, bytes]
    cells: Cells | None = None


def key_statement(run: str, round_number: int, attempt: int, client: int, key: bytes) -> bytes:
    """What a client signs; no part of it can be taken for another, nor for another statement."""
    known = [run, round_number, attempt, client, key.hex()]
    return b"fedkd secure sum key\n" + json.dumps(known).encode()


def masked_votes(
    client: Client, round_number: int, roster: Roster, private: bytes, signed: Signed | None
) -> np.ndarray:
    """A client's votes under its noise and its masks, uint32.

    Args:
        client: Whose.
        round_number: From 1.
        roster: As the server gave it.
        private: The client's key for this sum.
        signed: Checks signatures; None where clients have nothing to sign with (simulation).

    Raises:
        SumRefused: the roster is not one to hide in.
        BudgetSpent: no more sums are paid for, or this key was answered under.
    """
    context, release = client.context, client.context.release
    assert release is not None
    own = public_of(private)
    _check_cells(client, roster.cells)
    cells, index = roster.cells, context.questions(round_number)
    each = context.secure_sum(len(index) if cells is None else len(cells))
    _check_roster(client, round_number, roster, own, each.least, signed)
    client.budget.reserve_sum(round_number, release, each, own.hex())
    answers = client.probabilities(round_number)
    asked = answers[index] if cells is None else cells.ballots(answers[None])[0]
    values = each.encoded(release.contributions(asked), SecureGenerator())
    digest = roster_digest(client.run, round_number, roster.attempt, roster.keys)
    try:
        return masked(values, client.number, private, roster.keys, digest)
    except ValueError as error:
        raise SumRefused(f"a key with which nothing can be agreed on ({error})") from None


def _check_roster(
    client: Client,
    round_number: int,
    roster: Roster,
    own: bytes,
    least: int,
    signed: Signed | None,
) -> None:
    keys = roster.keys
    if len(keys) < least:
        raise SumRefused(
            f"a sum over {len(keys)} clients, at least {least} are needed (release.secure.missing)"
        )
    if keys.get(client.number) != own:
        raise SumRefused(f"client {client.number}'s own key is not in the sum")
    for number, key in keys.items():
        if number not in range(client.experiment.clients):
            raise SumRefused(f"client {number} in the sum, there are {client.experiment.clients}")
        if len(key) != KEY_BYTES:
            raise SumRefused(f"client {number}: a key of {len(key)} bytes, not {KEY_BYTES}")
    if len(set(keys.values())) < len(keys):
        raise SumRefused("two clients of the sum have the same key")
    if signed is None:
        return
    for number, key in keys.items():
        statement = key_statement(client.run, round_number, roster.attempt, number, key)
        if not signed(number, statement, roster.signatures.get(number, b"")):
            raise SumRefused(f"client {number}'s key is not signed by client {number}")


def _check_cells(client: Client, cells: Cells | None) -> None:
    """Whichever cells they are, a ballot about each costs the same; but not about more of them."""
    most = client.context.cells
    if (cells is None) != (most is None):
        raise SumRefused("release.cells: asked about images where the run asks about cells")
    if cells is None or most is None:
        return
    images = len(client.context.data.transfer.images)
    if len(cells.of) != images or not 0 <= int(cells.of.min()) <= int(cells.of.max()) < most:
        raise SumRefused(f"release.cells: expected {images} images in at most {most} cells")
    if len(torch.unique(cells.of)) != len(cells):
        raise SumRefused("release.cells: a cell without images")
