"""What an attack sees and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedkd.knowledge.query import Reply

# The logit that stands for probability one, and fits half precision.
CERTAIN = 20.0


@dataclass(frozen=True)
class Scene:
    """What an attacker knows, which is a lot: it receives what the honest clients send.

    Attributes:
        round: From 1.
        client: Who attacks.
        attackers: All who do, this one too.
        honest: What the others send in this round, by client.
        predictions: Names of the arrays that hold logits, (N, C).
        previous: What this client would have sent, being honest, a round before; None in round 1.
        mislabelled: The reply of a teacher of this client that was trained on wrong labels; None
            unless the study has such an attack.
        student: Answers of the student of the last round, by array name; None in round 1.
        max_abs: Largest magnitude that the server believes.
        rng: Of this attacker in this round.
        shared: The same for all attackers in all rounds: for what they agree on.
    """

    round: int
    client: int
    attackers: tuple[int, ...]
    honest: Mapping[int, Reply]
    predictions: tuple[str, ...]
    previous: Reply | None
    mislabelled: Reply | None
    student: Mapping[str, np.ndarray] | None
    max_abs: float
    rng: np.random.Generator
    shared: np.random.Generator

    def honest_mean(self, name: str) -> np.ndarray:
        """Mean probabilities of the honest clients, (N, C)."""
        return np.mean(
            [softmax(p.arrays[name].astype(np.float32)) for p in self.honest.values()], 0
        )


def changed(
    reply: Reply, change: Callable[[np.ndarray], np.ndarray], names: Sequence[str]
) -> Reply:
    """The same reply with `change` applied to the arrays `names`; each keeps its dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        return replaced(reply, {n: change(reply.arrays[n].astype(np.float32)) for n in names})


def replaced(reply: Reply, arrays: Mapping[str, np.ndarray]) -> Reply:
    """The same reply with other arrays under these names; each keeps its dtype."""
    typed = {name: value.astype(reply.arrays[name].dtype) for name, value in arrays.items()}
    return replace(reply, arrays={**reply.arrays, **typed})


def larger(reply: Reply, factor: float) -> Reply:
    """The same reply from a client that claims so many times as many images, of every class."""
    header = dict(reply.header)
    examples, counts = header.get("num_examples"), header.get("class_counts")
    if isinstance(examples, int):
        header["num_examples"] = round(factor * max(examples, 1))
    if isinstance(counts, list):
        header["class_counts"] = [round(factor * max(count, 1)) for count in counts]
    return replace(reply, header=header)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def certain(classes: np.ndarray, count: int) -> np.ndarray:
    """Logits that are sure of `classes` (N,), -> (N, count)."""
    return np.float32(CERTAIN) * np.eye(count, dtype=np.float32)[classes]
