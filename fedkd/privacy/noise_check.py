"""Is the noise as large as promised? Seen on tiny networks that are trained as teachers are.

What a private training adds to a network cannot be told from a trained teacher, but where no image
pulls at the weights they are the sum of all noise. So it is measured at every start-up, before an
image is read, and at length by `fedkd audit --mechanism`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedkd.data.images import ImageSet
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import Mechanism, fit_private_many
from fedkd.training.optimizers import Optimizer

FALSE_ALARM = 1e-9
"""Chance that right noise is refused at a start-up: there are many start-ups."""

SIDE = 32
"""Of the pictures at start-up: 2 x 32 x 32 weights show 7 % too much or too little noise."""

# A white picture's gradient, in clipping norms: far more than is let through.
_HUGE = 1000.0


@dataclass(frozen=True)
class Noise:
    """How large noise was.

    Attributes:
        ratio: Standard deviation, as a share of the promised one.
        numbers: How many it was taken from.
        p: Chance of a ratio as far from 1, or of such likeness of trainings, if all is right.
        shared: How far the mean over trainings is from zero, as a share of what chance allows:
            above 1 where trainings draw the same noise.
    """

    ratio: float
    numbers: int
    p: float
    shared: float

    @property
    def alike(self) -> bool:
        """Whether trainings draw the same noise."""
        return self.shared > 1.2


def check_noise(mechanism: Mechanism) -> None:
    """Refuse to train privately where the noise is not the promised one.

    Two networks are trained for two steps on no images at all, each alone and then both together:
    milliseconds.

    Args:
        mechanism: As teachers will be trained.

    Raises:
        RuntimeError: with what was expected and what was seen.
    """
    if mechanism.noise_multiplier == 0:
        return
    twice = replace(mechanism, steps=2)
    for together in (False, True):
        moved = trained(twice, pictures(0, 0, SIDE), 2, together=together)
        seen = noise_of(moved, twice.noise_multiplier * math.sqrt(2))
        if seen.p < FALSE_ALARM:
            how = "of clients together" if together else "of a client"
            alike = " and two trainings draw the same noise" if seen.alike else ""
            raise RuntimeError(
                f"the noise of DP-SGD is not the promised one: in two steps {how} without images "
                f"its standard deviation is {seen.ratio:.3g} of the expected {_words(mechanism)}"
                f"{alike} (p {seen.p:.1g}). No teacher is trained so: look for what was "
                "changed in fedkd/privacy, or in the installed opacus"
            )


def _words(mechanism: Mechanism) -> str:
    m = mechanism
    return (
        f"{m.noise_multiplier * m.max_grad_norm / m.expected_batch_size:.4g} a step "
        f"(noise_multiplier {m.noise_multiplier:.4g} x max_grad_norm {m.max_grad_norm:g} / "
        f"expected batch {m.expected_batch_size:g})"
    )


def pictures(black: int, white: int, side: int) -> ImageSet:
    """Images for `trained`: black ones have no gradient, white ones all the same huge one."""
    images = torch.zeros(black + white, 1, side, side, dtype=torch.uint8)
    images[black:] = 255
    return ImageSet(images, torch.zeros(len(images), dtype=torch.int64), ("a", "b"))


def trained(
    mechanism: Mechanism,
    shard: ImageSet,
    count: int,
    *,
    together: bool,
    rounds: int = 1,
) -> Tensor:
    """What `count` private trainings add to a linear network, float64 (count, weights).

    In units of what one image may move it in one step: the sum of the noisy gradients over the
    clipping norm. The optimiser is plain SGD; whatever another one does with the noisy gradients
    makes nothing less private.

    Args:
        mechanism: Of one round.
        shard: Of `pictures`.
        count: How many trainings.
        together: As clients are trained together, or one after the other.
        rounds: One training after the other of each network.

    Raises:
        RuntimeError: a training failed.
    """
    side, bound, size = (
        shard.images.shape[2],
        mechanism.max_grad_norm,
        mechanism.expected_batch_size,
    )
    pixel = _HUGE * math.sqrt(2) * bound / side  # gradient of a white picture: (pixel, -pixel) / 2
    steps = mechanism.steps * rounds
    reach = steps + 6 * mechanism.noise_multiplier * math.sqrt(steps)
    # So slowly that the logits of a white picture stay near zero, and its gradient huge.
    lr = 0.01 * size / (bound * reach * pixel * side)
    networks = [_network(side, 1 / pixel) for _ in range(count)]
    for _ in range(rounds):
        errors = fit_private_many(
            networks,
            [shard] * count,
            mechanism,
            optimizer=Optimizer(
                name="sgd", lr=lr, momentum=0.0, weight_decay=0.0, schedule="constant"
            ),
            together=together,
        )
        for error in errors:
            if error is not None:
                raise RuntimeError(f"a private training of the audit failed: {error}") from error
    weights = torch.stack([next(n.parameters()).detach().flatten() for n in networks])
    return -weights.double() * size / (lr * bound)


def direction(side: int) -> Tensor:
    """Where the gradient of a white picture points, of norm 1, float64 (weights,)."""
    half = torch.ones(side * side, dtype=torch.float64)
    return torch.cat([-half, half]) / math.sqrt(2 * side * side)


def noise_of(moved: Tensor, deviation: float) -> Noise:
    """Compare trainings that no image moved, (N, weights), with noise of this deviation.

    Two chi-square tests: on the means over trainings, and on what is left. Noise that is drawn
    alike in several trainings shows in the first.
    """
    count, weights = moved.shape
    units = moved / deviation
    mean = units.mean(0)
    between = float(mean.square().sum()) * count
    within = float((units - mean).square().sum())
    tests = [chi_square(between, weights)]
    if count > 1:
        tests.append(chi_square(within, weights * (count - 1)))
    return Noise(
        ratio=math.sqrt((between + within) / (count * weights)),
        numbers=count * weights,
        p=min(1.0, len(tests) * min(tests)),
        shared=math.sqrt(between / weights),
    )


def chi_square(squares: float, freedom: int) -> float:
    """Chance of a sum of squares as far from its mean, two-sided, for a hundred or more.

    References:
        Wilson and Hilferty, "The Distribution of Chi-Square", PNAS 1931
    """
    spread = 2 / (9 * freedom)
    deviate = ((squares / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(abs(deviate) / math.sqrt(2))


def _network(side: int, deviation: float) -> Network:
    """Without a bias: a black picture has no gradient."""
    layer = nn.Linear(side * side, 2, bias=False)
    nn.init.zeros_(layer.weight)
    return Network(nn.Sequential(nn.Flatten(), layer), mean=[0.0], std=[deviation])
