"""Local training of a teacher with DP-SGD: its weights reveal little about any single image.

The guarantee is for adding or removing one image of one client (Poisson sampling, Gaussian noise).
All that fixes it is public: sampling rate, steps, noise, clipping norm and the divisor of the
gradient follow from the config and a *nominal* shard size, never from the number of images that a
client has. Whatever is done with the trained teacher later costs nothing more.

What a number of such steps costs is computed, and held to a budget, elsewhere.

References:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016,
    https://arxiv.org/abs/1607.00133
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import pad_sequence

from fedkd.data.images import ImageSet
from fedkd.data.views import augment_batch
from fedkd.models.linear import PrincipalClassifier
from fedkd.models.network import Network
from fedkd.models.stacked import Stack, write_state
from fedkd.models.taps import evaluating
from fedkd.privacy.clipping import ClippedSteps, Clipping, Criterion, Part
from fedkd.privacy.model_check import static_problems
from fedkd.privacy.noise import SecureGenerator
from fedkd.randomness import seeded, stream_seed
from fedkd.training.batched import RowDropout, check_lengths, train_each
from fedkd.training.loop import check_finite, check_time
from fedkd.training.optimizers import (
    DEFAULT_OPTIMIZER,
    Optimizer,
    RowOptimizer,
    learning_rate,
    make_optimizer,
)
from fedkd.training.supervised import Regulariser

# Images that are read at once where nothing is trained.
_READ = 256

_Inputs = tuple[Tensor, Tensor]
"""What is drawn from: images (N, ...), or what is read of them once, and their labels (N,)."""


@dataclass(frozen=True)
class Mechanism:
    """What a client does in one round; all of it is public.

    Attributes:
        sample_rate: Probability with which an image takes part in a step.
        expected_batch_size: What the noisy sum of gradients is divided by.
        steps: Steps of one client in one round.
        noise_multiplier: Standard deviation of the noise in units of `max_grad_norm`.
        max_grad_norm: Euclidean norm to which each image's gradient is clipped.
        clipping: `ghost` needs less memory and is faster where large linear layers dominate.
        physical_batch: Images that go through the network at once; a matter of memory alone.
    """

    sample_rate: float
    expected_batch_size: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float = 1.0
    clipping: Clipping = "hooks"
    physical_batch: int = 256

    def __post_init__(self) -> None:
        wrong = [
            ("sample_rate", 0 < self.sample_rate <= 1, "more than 0 and at most 1"),
            ("expected_batch_size", self.expected_batch_size > 0, "more than 0"),
            ("steps", self.steps >= 1, "at least 1"),
            ("noise_multiplier", self.noise_multiplier >= 0, "at least 0"),
            ("max_grad_norm", self.max_grad_norm > 0, "more than 0"),
            ("clipping", self.clipping in ("hooks", "ghost"), "hooks or ghost"),
            ("physical_batch", self.physical_batch >= 1, "at least 1"),
        ]
        for name, right, expected in wrong:
            if not right:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def of(
        cls, nominal_size: int, batch_size: int, epochs: int, noise_multiplier: float, **more: Any
    ) -> Self:
        """The steps that `epochs` over a shard of nominal size take.

        Args:
            nominal_size: Public size of a shard. A client with fewer images loses accuracy, one
                with more draws larger batches; the guarantee holds for both.
            batch_size: Expected size of a batch; the whole nominal shard if that is smaller.
            epochs: Passes over the nominal shard.
            noise_multiplier: As in the class.
            **more: `max_grad_norm`, `clipping`, `physical_batch`.
        """
        batch = min(batch_size, nominal_size)
        steps = math.ceil(nominal_size / batch) * epochs
        return cls(batch / nominal_size, float(batch), steps, noise_multiplier, **more)


def fit_private(
    teacher: Network,
    shard: ImageSet,
    mechanism: Mechanism,
    *,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    augment: str = "none",
    label_smoothing: float = 0.0,
    seed: int | None = None,
    noise_seed: int | None = None,
    regulariser: Regulariser | None = None,
    watch: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Train `teacher` (in place) on a private shard for one round of `mechanism`.

    Nothing is returned: a loss or an accuracy on private images is not covered by the guarantee.
    Weights go on from round to round; the optimiser and its schedule begin anew.

    Args:
        teacher: A network that `check_private` has let pass.
        shard: Labelled private images, any number of them; none moves the teacher by noise alone.
        mechanism: What is done: how many steps, and of how many images.
        optimizer: Optimiser and schedule.
        augment: Recipe, as in plain training.
        label_smoothing: As in plain training.
        seed: Of who is drawn, augmentation and dropout; None takes a secret from the operating
            system. The bound for sampled batches holds only against those who cannot tell who was
            drawn, and the server knows the run's seed: give one in simulations only.
        noise_seed: Of the noise, otherwise the operating system's. Who knows it can take the noise
            away again, so there is no privacy: for tests only.
        regulariser: What else the teacher is held to.
        watch: Entered around every step, for an audit: before it the weights are there, after it
            the noisy gradients as well.

    Raises:
        ValueError: a model that is seen to break the guarantee, an optimiser that clips batches,
            or a shard without labels.
        RuntimeError: weights are not finite, before or after.
    """
    _check(teacher, shard, mechanism, optimizer)
    seed = secrets.randbits(128) if seed is None else seed
    device = teacher.mean.device
    draws = SecureGenerator(seed)
    learns: nn.Module = teacher
    inputs = _inputs(shard)
    if augment == "none" and regulariser is None and (head := _only_head(teacher)) is not None:
        learns, inputs = head, (_features(teacher, shard.images), inputs[1])
    steps_of, schedule = make_optimizer(
        [p for p in teacher.parameters() if p.requires_grad], optimizer, mechanism.steps
    )
    with (
        seeded(seed, "teacher"),
        ClippedSteps(
            learns,
            private_criterion(label_smoothing, regulariser),
            steps_of,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_grad_norm,
            expected_batch_size=mechanism.expected_batch_size,
            clipping=mechanism.clipping,
            noise=SecureGenerator(noise_seed),
        ) as steps,
    ):
        for step in range(mechanism.steps):
            batch = _batch(inputs, mechanism, augment, seed, draws, step)
            pieces = _split(batch, mechanism.physical_batch)
            with watch():
                steps.step([_part(piece, regulariser, device) for piece in pieces])
            schedule.step()
    _finish(teacher)


def fit_private_many(
    teachers: Sequence[Network],
    shards: Sequence[ImageSet],
    mechanism: Mechanism,
    *,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    augment: str = "none",
    label_smoothing: float = 0.0,
    seeds: Sequence[int | None] | None = None,
    noise_seeds: Sequence[int | None] | None = None,
    regularisers: Sequence[Regulariser | None] | None = None,
    together: bool | None = None,
) -> list[Exception | None]:
    """Train each teacher (in place) on its shard, as `fit_private` does it.

    Every client draws its own images and its own noise, and each of its images is clipped by
    itself: the guarantee is the one of `fit_private`, and so is the account of it.

    Args:
        teachers: One network per client.
        shards: Its labelled private images.
        mechanism: As in `fit_private`, for all of them.
        optimizer: Likewise.
        augment: Likewise.
        label_smoothing: Likewise.
        seeds: Each as in `fit_private`; None: all secret.
        noise_seeds: Likewise.
        regularisers: What each is held to; None: nothing.
        together: Whether teachers of one architecture (and one regulariser) are trained as one
            batch; None: on accelerators.

    Returns:
        For each client None, or the error that `fit_private` raises.

    Raises:
        ValueError: there are more or fewer shards, seeds or regularisers than teachers.
    """
    count = len(teachers)
    secret: Sequence[int | None] = [None] * count
    lists: dict[str, Sequence[Any]] = {
        "shards": shards,
        "seeds": secret if seeds is None else seeds,
        "noise_seeds": secret if noise_seeds is None else noise_seeds,
        "regularisers": [None] * count if regularisers is None else regularisers,
    }
    check_lengths(count, lists)
    clients = [_Client(*each) for each in zip(teachers, *lists.values(), strict=True)]
    how: dict[str, Any] = {
        "mechanism": mechanism,
        "optimizer": optimizer,
        "augment": augment,
        "label_smoothing": label_smoothing,
    }

    def key(number: int) -> Hashable:
        client = clients[number]
        try:
            _check(client.teacher, client.shard, mechanism, optimizer)
        except (ValueError, RuntimeError):
            return None  # `fit_private` raises it again
        if _only_head(client.teacher) is not None:
            return None  # whose features are read once, where it is alone
        return client.shard.shape, id(client.regulariser)

    def alone(number: int) -> None:
        client = clients[number]
        fit_private(
            client.teacher,
            client.shard,
            **how,
            seed=client.seed,
            noise_seed=client.noise_seed,
            regulariser=client.regulariser,
        )

    return train_each(
        teachers,
        key,
        lambda group: _fit_together([clients[number] for number in group], **how),
        alone,
        together=together,
    )


@dataclass(frozen=True)
class _Client:
    """Who is trained, on what."""

    teacher: Network
    shard: ImageSet
    seed: int | None
    noise_seed: int | None
    regulariser: Regulariser | None


def _fit_together(
    clients: Sequence[_Client],
    mechanism: Mechanism,
    optimizer: Optimizer,
    augment: str,
    label_smoothing: float,
) -> list[Exception | None]:
    regulariser = clients[0].regulariser
    teachers = [client.teacher for client in clients]
    device = teachers[0].mean.device
    stack = Stack(teachers, training=True)
    stepper = RowOptimizer(optimizer, stack.weights)
    criterion = private_criterion(label_smoothing, regulariser)
    seeds = [secrets.randbits(128) if c.seed is None else c.seed for c in clients]
    draws = [SecureGenerator(seed) for seed in seeds]
    noise = [SecureGenerator(client.noise_seed) for client in clients]
    dropout = RowDropout([stream_seed(seed, "teacher") for seed in seeds], stack.weights)
    bound, size = mechanism.max_grad_norm, mechanism.expected_batch_size
    deviation = mechanism.noise_multiplier * bound / size
    for step in range(mechanism.steps):
        check_time()
        batches = [
            _batch(_inputs(client.shard), mechanism, augment, seed, own, step)
            for client, seed, own in zip(clients, seeds, draws, strict=True)
        ]
        gradients = torch.zeros_like(stack.weights)
        longest = max(len(labels) for _, labels in batches)
        for start in range(0, longest, mechanism.physical_batch):
            rows = slice(start, start + mechanism.physical_batch)
            counts = [len(labels[rows]) for _, labels in batches]
            images = pad_sequence([images[rows] for images, _ in batches], True).to(device)
            labels = pad_sequence([labels[rows] for _, labels in batches], True).to(device)
            there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            targets = [labels]
            if regulariser is not None:
                wanted = regulariser.logits(images.flatten(0, 1))
                targets.append(wanted.unflatten(0, labels.shape))
            gradients += stack.clipped_sum(
                criterion,
                bound,
                there.to(device),
                images,
                *targets,
                draw=dropout.of(torch.tensor([step], device=device), counts, start),
            )
        gradients /= size
        if deviation > 0:
            gradients += torch.stack([_noise(own, stack, deviation) for own in noise]).to(gradients)
        lr = learning_rate(optimizer, step, mechanism.steps)
        first, second = RowOptimizer.corrections(step)
        new = gradients.new_tensor
        stepper.step(gradients, new(lr), (new(first), new(second)))
    errors: list[Exception | None] = []
    for row, teacher in enumerate(teachers):
        write_state(teacher, stack.row(row))
        try:
            _finish(teacher)
            errors.append(None)
        except RuntimeError as error:
            errors.append(error)
    return errors


def _noise(generator: SecureGenerator, stack: Stack, deviation: float) -> Tensor:
    """Noise for a network, (P,): drawn layer by layer, as for a network alone."""
    parts = (generator.normal(tuple(shape), deviation) for shape in stack.shapes)
    return torch.cat([part.flatten() for part in parts])


def _check(teacher: Network, shard: ImageSet, mechanism: Mechanism, optimizer: Optimizer) -> None:
    problems = list(static_problems(teacher, mechanism.clipping))
    if problems:
        raise ValueError(f"this teacher cannot be trained privately: {problems[0]}")
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            "teachers.optimizer.max_grad_norm clips the gradient of a batch; with DP-SGD each "
            "image's is clipped already, leave it out"
        )
    if shard.labels is None:
        raise ValueError("a teacher learns from labelled images, this shard has no labels")
    check_finite(teacher, "the teacher's weights are not finite before its training")


def _finish(teacher: Network) -> None:
    teacher.eval()
    # The weights are protected already: to look at them costs nothing.
    check_finite(
        teacher,
        "the teacher's weights are not finite after its training",
        "lower teachers.optimizer.lr or the noise",
    )


def poisson(total: int, rate: float, generator: SecureGenerator) -> Tensor:
    """Numbers of the examples that take part: each with probability `rate`, on its own."""
    return generator.bernoulli(rate, total).nonzero().flatten()


def private_criterion(label_smoothing: float, regulariser: Regulariser | None) -> Criterion:
    """The teacher's loss per example: (logits, labels, the student's logits if it regularises)."""

    def criterion(logits: Tensor, labels: Tensor, *student_logits: Tensor) -> Tensor:
        loss = functional.cross_entropy(
            logits, labels, label_smoothing=label_smoothing, reduction="none"
        )
        if regulariser is not None:
            loss = loss + regulariser.per_sample(logits, *student_logits)
        return loss

    return criterion


def _inputs(shard: ImageSet) -> _Inputs:
    assert shard.labels is not None
    return shard.images, shard.labels


def _only_head(teacher: Network) -> nn.Linear | None:
    """The head, if a body that is never trained enters it, always the same for an image."""
    body, head = teacher.body, teacher.head
    linear = isinstance(body, PrincipalClassifier) and body.reader is not None
    if head is None or not (linear or teacher.base is not None):
        return None
    learning = {id(p) for p in teacher.parameters() if p.requires_grad}
    drops = any(isinstance(module, _DropoutNd) and module.p > 0 for module in teacher.modules())
    return None if drops or learning != {id(p) for p in head.parameters()} else head


def _features(teacher: Network, images: Tensor) -> Tensor:
    """What enters the head, (N, D), read once for all steps."""
    found = []
    with evaluating(teacher):
        for part in images.split(_READ) if len(images) else [images]:
            pooled = teacher.read(part.to(teacher.mean.device)).pooled
            assert pooled is not None
            found.append(pooled.cpu())
    return torch.cat(found)


def _batch(
    shard: _Inputs,
    mechanism: Mechanism,
    augment: str,
    seed: int,
    draws: SecureGenerator,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step. It may have none: then it is a step of noise alone."""
    inputs, labels = shard
    drawn = poisson(len(labels), mechanism.sample_rate, draws)
    taken = inputs[drawn]
    if len(taken) and augment != "none":
        taken = augment_batch(taken, augment, seed, "augment", step)
    return taken, labels[drawn]


def _split(batch: tuple[Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of at most `size` images; none of an empty batch."""
    images, labels = batch
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


def _part(
    piece: tuple[Tensor, Tensor], regulariser: Regulariser | None, device: torch.device
) -> Part:
    images, labels = (tensor.to(device) for tensor in piece)
    if regulariser is None:
        return images, labels
    return images, labels, regulariser.logits(images)
