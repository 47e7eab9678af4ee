"""Clients that answer without having trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Scene, certain, changed, replaced
from fedkd.knowledge.query import Reply


@ATTACKS.register("uniform_rider")
def uniform_rider(sent: Reply, scene: Scene) -> Reply:
    """Every class is equally likely."""
    return changed(sent, np.zeros_like, scene.predictions)


@ATTACKS.register("constant_rider")
def constant_rider(sent: Reply, scene: Scene) -> Reply:
    """Always the same class, each rider's own."""
    count = sent.arrays[scene.predictions[0]].shape[1]
    return changed(
        sent, lambda old: certain(np.full(len(old), scene.client % count), count), scene.predictions
    )


@ATTACKS.register("random_rider")
def random_rider(sent: Reply, scene: Scene) -> Reply:
    """Logits drawn from a normal distribution, as an untrained network might give."""
    return changed(sent, lambda old: 3 * scene.rng.standard_normal(old.shape), scene.predictions)


@ATTACKS.register("copycat")
def copycat(sent: Reply, scene: Scene) -> Reply:
    """Repeats the public student of the round before; uniform in round 1."""
    if scene.student is None:
        return changed(sent, np.zeros_like, scene.predictions)
    return replaced(sent, {name: scene.student[name] for name in scene.predictions})


@ATTACKS.register("stale")
def stale(sent: Reply, scene: Scene) -> Reply:
    """The opinions of the round before under this round's header; honest in round 1."""
    return sent if scene.previous is None else replace(sent, arrays=scene.previous.arrays)
