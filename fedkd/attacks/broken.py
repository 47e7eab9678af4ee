"""Messages that must be refused: broken numbers, shapes and headers; and silence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Payload, Scene


@ATTACKS.register("absent")
def absent(sent: Payload, scene: Scene) -> Payload | None:
    """Says nothing: what a defence that recognises every attacker would be left with."""
    return None


@ATTACKS.register("nan")
def nan(sent: Payload, scene: Scene) -> Payload:
    """One number in a thousand is NaN."""
    return _spoilt(sent, scene, np.nan)


@ATTACKS.register("infinity")
def infinity(sent: Payload, scene: Scene) -> Payload:
    """One number in a thousand is infinite."""
    return _spoilt(sent, scene, np.inf)


@ATTACKS.register("huge")
def huge(sent: Payload, scene: Scene) -> Payload:
    """One number in a thousand is 1e30, which half precision makes infinite."""
    return _spoilt(sent, scene, 1e30)


@ATTACKS.register("wrong_shape")
def wrong_shape(sent: Payload, scene: Scene) -> Payload:
    """The last class is missing."""
    cut = {name: np.ascontiguousarray(sent.arrays[name][:, :-1]) for name in scene.predictions}
    return replace(sent, arrays={**sent.arrays, **cut})


@ATTACKS.register("replay")
def replay(sent: Payload, scene: Scene) -> Payload:
    """The message of the round before, as it was; honest in round 1."""
    return scene.previous or sent


@ATTACKS.register("duplicate")
def duplicate(sent: Payload, scene: Scene) -> Payload:
    """Speaks in the name of an honest client, to be counted twice."""
    return replace(sent, header={**sent.header, "client": min(scene.honest)})


def _spoilt(sent: Payload, scene: Scene, value: float) -> Payload:
    def spoil(logits: np.ndarray) -> np.ndarray:
        count = max(1, logits.size // 1000)
        logits.flat[scene.rng.choice(logits.size, count, replace=False)] = value
        return logits

    return sent.saying(spoil, scene.predictions)
