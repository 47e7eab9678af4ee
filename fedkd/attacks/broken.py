"""Messages that must be refused: broken numbers, shapes and headers; and silence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Scene, changed
from fedkd.knowledge.query import Reply


@ATTACKS.register("absent")
def absent(sent: Reply, scene: Scene) -> Reply | None:
    """Says nothing: what a defence that recognises every attacker would be left with."""
    return None


@ATTACKS.register("nan")
def nan(sent: Reply, scene: Scene) -> Reply:
    """One number in a thousand is NaN."""
    return _spoilt(sent, scene, np.nan)


@ATTACKS.register("infinity")
def infinity(sent: Reply, scene: Scene) -> Reply:
    """One number in a thousand is infinite."""
    return _spoilt(sent, scene, np.inf)


@ATTACKS.register("huge")
def huge(sent: Reply, scene: Scene) -> Reply:
    """One number in a thousand is 1e30, which half precision makes infinite."""
    return _spoilt(sent, scene, 1e30)


@ATTACKS.register("wrong_shape")
def wrong_shape(sent: Reply, scene: Scene) -> Reply:
    """The last class is missing."""
    return changed(sent, lambda old: np.ascontiguousarray(old[:, :-1]), scene.predictions)


@ATTACKS.register("replay")
def replay(sent: Reply, scene: Scene) -> Reply:
    """The message of the round before, as it was; honest in round 1."""
    return scene.previous or sent


@ATTACKS.register("duplicate")
def duplicate(sent: Reply, scene: Scene) -> Reply:
    """Speaks in the name of an honest client, to be counted twice."""
    return replace(sent, header={**sent.header, "client": min(scene.honest)})


def _spoilt(sent: Reply, scene: Scene, value: float) -> Reply:
    def spoil(logits: np.ndarray) -> np.ndarray:
        count = max(1, logits.size // 1000)
        logits.flat[scene.rng.choice(logits.size, count, replace=False)] = value
        return logits

    return changed(sent, spoil, scene.predictions)
