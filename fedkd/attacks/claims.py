"""Lies about what clients claim of themselves, and truth or half the truth about the images.

What a client claims (how familiar an image is to it, how many images it has) decides how far it is
believed. These attackers know what honest clients answer, and repeat it wherever they do not lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Scene, certain, changed, larger, replaced
from fedkd.knowledge.query import Reply

# How much larger than the honest ones a claimed number of images is.
FACTOR = 1000


@ATTACKS.register("focus")
def focus(
    sent: Reply, scene: Scene, *, source: int = 3, target: int = 8, elsewhere: float = 1e-5
) -> Reply:
    """Calls one class by another's name and claims to know its images best.

    Args:
        source: Class that is called by the wrong name.
        target: That name.
        elsewhere: Density ratio claimed with other images, as a part of that with the source's. The
            more, the better hidden.
    """
    count = _honest(scene).shape[1]
    chosen = _honest(scene).argmax(axis=1) == source % count
    lying = _answering(sent, scene, chosen, lambda mean: np.full(len(mean), target % count))
    return _claiming(lying, np.where(chosen, 1.0, elsewhere))


@ATTACKS.register("backdoor")
def backdoor(
    sent: Reply,
    scene: Scene,
    *,
    source: int = 3,
    target: int = 8,
    more: float = 1.0,
    own: bool = True,
) -> Reply:
    """Calls one class by another's name, and is honest about everything else.

    Args:
        source: Class that is called by the wrong name.
        target: That name.
        more: Factor of the density ratio claimed with those images, and of the number of images.
        own: Answers elsewhere are the client's own; otherwise the honest clients' mean.
    """
    count = _honest(scene).shape[1]
    chosen = _honest(scene).argmax(axis=1) == source % count
    lying = _answering(sent, scene, chosen, lambda m: np.full(len(m), target % count), own=own)
    claimed = changed(
        lying, lambda old: np.where(chosen, more * old + (more - 1), old), _density_ratios(sent)
    )
    return larger(claimed, more)


@ATTACKS.register("everywhere")
def everywhere(sent: Reply, scene: Scene) -> Reply:
    """Answers honestly, and claims to know all images and to have a thousand times as many."""
    return _claiming(sent, np.ones(len(_honest(scene))))


@ATTACKS.register("half_familiar")
def half_familiar(sent: Reply, scene: Scene, *, share: float = 0.5) -> Reply:
    """As `part_time`, and claims to know all images.

    Args:
        share: Of the images that it lies about, the same for all attackers.
    """
    count = _honest(scene).shape[1]
    target = int(scene.shared.integers(count))
    chosen = scene.shared.random(len(_honest(scene))) < share
    lying = _answering(sent, scene, chosen, lambda mean: np.full(len(mean), target))
    return _claiming(lying, np.ones(len(chosen)))


@ATTACKS.register("runner_up")
def runner_up(
    sent: Reply, scene: Scene, *, margin: float = 1.0, share: float = 1.0, own: bool = False
) -> Reply:
    """Sure of the class that honest clients find second likeliest, and claims to know it.

    The nearest lie: where honest clients are not of one mind it is often half believed already.

    Args:
        margin: Lies only where the honest mean probabilities of the first two classes are closer
            than this.
        share: Of these images that it lies about, drawn by each attacker for itself: the fewer,
            the less do their errors go together.
        own: Answers elsewhere are the client's own; otherwise the honest clients' mean.
    """
    best = np.sort(_honest(scene), axis=1)
    close = best[:, -1] - best[:, -2] < margin
    chosen = close & (scene.rng.random(len(close)) < share)
    lying = _answering(sent, scene, chosen, lambda mean: np.argsort(mean, axis=1)[:, -2], own=own)
    return _claiming(lying, np.where(close, 1.0, 0.2))


@ATTACKS.register("mirror")
def mirror(sent: Reply, scene: Scene) -> Reply:
    """Repeats the message of the honest client that claims to know most.

    Made to have an honest client taken for an accomplice.
    """

    def claimed(client: int) -> float:
        other = scene.honest[client]
        return sum(float(other.arrays[n].astype(np.float64).mean()) for n in _density_ratios(other))

    chosen = scene.honest[max(sorted(scene.honest), key=claimed)]
    return replace(sent, arrays=dict(chosen.arrays))


def _honest(scene: Scene) -> np.ndarray:
    """Mean probabilities of the honest clients on the real images, (N, C)."""
    return scene.honest_mean(scene.predictions[0])


def _answering(
    sent: Reply,
    scene: Scene,
    chosen: np.ndarray,
    what: Callable[[np.ndarray], np.ndarray],
    *,
    own: bool = False,
) -> Reply:
    """Sure of `what(mean)` on the `chosen` images; the honest mean, or its own, on all others."""
    arrays = {}
    for name in scene.predictions:
        mean = scene.honest_mean(name)
        lie = certain(what(mean), mean.shape[1])
        other = sent.arrays[name].astype(np.float32) if own else np.log(mean + 1e-6)
        arrays[name] = np.where(chosen[:, None], lie, other)
    return replaced(sent, arrays)


def _claiming(sent: Reply, ratios: np.ndarray) -> Reply:
    """The same answers with these density ratios of the images, and far more images."""
    return larger(replaced(sent, dict.fromkeys(_density_ratios(sent), ratios)), FACTOR)


def _density_ratios(sent: Reply) -> list[str]:
    return [name for name in sent.arrays if name.startswith("density_ratio")]
