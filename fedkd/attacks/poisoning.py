"""Well-formed lies about the transfer set.

References:
    Roux, Zimmer, Pokutta, "On the Byzantine-Resilience of Distillation-Based Federated Learning",
        ICLR 2025, https://arxiv.org/abs/2402.12265 (LMA, CPA).
"""

from __future__ import annotations

import numpy as np

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Scene, certain, changed, larger, replaced
from fedkd.knowledge.query import Reply


@ATTACKS.register("loud")
def loud(sent: Reply, scene: Scene) -> Reply:
    """Random numbers as large as the server believes: garbage that passes every check."""
    limit = 0.99 * scene.max_abs
    return changed(sent, lambda old: scene.rng.uniform(-limit, limit, old.shape), scene.predictions)


@ATTACKS.register("permuted")
def permuted(sent: Reply, scene: Scene) -> Reply:
    """The classes are in a random order, another one for each attacker and round."""
    order = scene.rng.permutation(sent.arrays[scene.predictions[0]].shape[1])
    return changed(sent, lambda old: old[:, order], scene.predictions)


@ATTACKS.register("shift")
def shift(sent: Reply, scene: Scene, *, amount: float = 10.0) -> Reply:
    """Something is added to the logit of one class, each attacker's own.

    Args:
        amount: How much.
    """
    count = sent.arrays[scene.predictions[0]].shape[1]
    change = np.zeros(count, dtype=np.float32)
    change[scene.client % count] = amount
    return changed(sent, lambda old: old + change, scene.predictions)


@ATTACKS.register("scale")
def scale(sent: Reply, scene: Scene, *, factor: float = 20.0) -> Reply:
    """Honest opinions with far too much confidence.

    Args:
        factor: Of all logits.
    """
    return changed(
        sent, lambda old: np.clip(factor * old, -scene.max_abs, scene.max_abs), scene.predictions
    )


@ATTACKS.register("sign_flip")
def sign_flip(sent: Reply, scene: Scene) -> Reply:
    """The least likely class becomes the most likely one."""
    return changed(sent, np.negative, scene.predictions)


@ATTACKS.register("top_k")
def top_k(sent: Reply, scene: Scene, *, k: int = 3) -> Reply:
    """The k largest logits of each image in reverse: hard to see, and wrong where it matters.

    Args:
        k: How many.
    """

    def reverse(logits: np.ndarray) -> np.ndarray:
        best = np.argsort(-logits, axis=1)[:, :k]
        values = np.take_along_axis(logits, best, axis=1)
        np.put_along_axis(logits, best, values[:, ::-1], axis=1)
        return logits

    return changed(sent, reverse, scene.predictions)


@ATTACKS.register("lma")
def lma(sent: Reply, scene: Scene) -> Reply:
    """Loss maximisation: sure of the class that the honest clients find least likely."""
    lies = {
        name: certain((mean := scene.honest_mean(name)).argmin(axis=1), mean.shape[1])
        for name in scene.predictions
    }
    return replaced(sent, lies)


@ATTACKS.register("cpa")
def cpa(sent: Reply, scene: Scene) -> Reply:
    """Class prior attack: sure of the class least like the one the honest clients name.

    Likeness is the covariance of the honest mean probabilities over the transfer set.
    """
    lies = {}
    for name in scene.predictions:
        mean = scene.honest_mean(name)
        opposite = np.cov(mean, rowvar=False).argmin(axis=1)
        lies[name] = certain(opposite[mean.argmax(axis=1)], mean.shape[1])
    return replaced(sent, lies)


@ATTACKS.register("collude")
def collude(sent: Reply, scene: Scene) -> Reply:
    """All attackers are sure that every image shows the same class."""
    return _agreed(sent, scene)


@ATTACKS.register("part_time")
def part_time(sent: Reply, scene: Scene, *, share: float = 0.5) -> Reply:
    """As `collude` on some images, the mean of the honest clients on all others.

    Made to slip past rules that judge a client as a whole.

    Args:
        share: Of the images that it lies about, the same for all attackers.
    """
    lying = _agreed(sent, scene)
    count = len(sent.arrays[scene.predictions[0]])
    chosen = scene.shared.random(count) < share
    lies = {
        name: np.where(chosen[:, None], lying.arrays[name], np.log(scene.honest_mean(name) + 1e-6))
        for name in scene.predictions
    }
    return replaced(sent, lies)


@ATTACKS.register("inflate")
def inflate(sent: Reply, scene: Scene, *, factor: int = 1000) -> Reply:
    """As `collude`, and they claim to have seen far more images, of every class.

    Args:
        factor: Of the number of images; at least so many are claimed of each class.
    """
    return larger(_agreed(sent, scene), factor)


@ATTACKS.register("label_noise")
def label_noise(sent: Reply, scene: Scene) -> Reply:
    """The teacher was trained on wrong labels: each class is called by the name of the next."""
    assert scene.mislabelled is not None
    return scene.mislabelled


def _agreed(sent: Reply, scene: Scene) -> Reply:
    count = sent.arrays[scene.predictions[0]].shape[1]
    target = int(scene.shared.integers(count))
    return changed(sent, lambda old: certain(np.full(len(old), target), count), scene.predictions)
