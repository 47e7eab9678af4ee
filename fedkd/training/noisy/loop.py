"""The epochs of a training on noisy labels, in the order of the published code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedkd.data.images import ImageSet
from fedkd.data.views import MIRRORING, Draws, augmented, check_augmentation
from fedkd.functional.noisy_labels import (
    Mixture,
    loss_mixture,
    rescaled,
    select_for_unlearning,
)
from fedkd.models.network import Network
from fedkd.randomness import seeded, stream, stream_seed
from fedkd.training.batches import batches, check_batch_size, steps_per_epoch
from fedkd.training.evaluation import accuracy, predict
from fedkd.training.loop import Means, Measured, Phase, Trainer
from fedkd.training.noisy.options import Noisy
from fedkd.training.noisy.pair import agreement_shares, in_mode, snapshot_of
from fedkd.training.noisy.references import (
    References,
    embedded,
    few_neighbours,
    neighbour_labels,
)
from fedkd.training.noisy.steps import (
    Forward,
    Labelled,
    Mixed,
    forget_step,
    mix_step,
    mix_weight,
    reference_step,
    warmup_step,
)
from fedkd.training.numerics import numerics
from fedkd.training.optimizers import DEFAULT_OPTIMIZER, Optimizer
from fedkd.training.supervised import Fit

FIRST, SECOND = "a", "v"
FEWEST = 0.02
"""Share of the labels that count as clean at least, where none is above the threshold."""

KEPT = 0.1
"""Share of a class's labels that count as clean where none of them is above the threshold."""
BINS = 24

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""Everything to go on from, of tensors on the CPU and plain values."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Noted:
    """What is measured beside the training and never learnt from.

    Attributes:
        truth: True labels of the shard, (N,), where somebody knows them.
        test: Labelled images to test both networks on.
        every: Epochs between tests; the last one is tested.
    """

    truth: Tensor | None = None
    test: ImageSet | None = None
    every: int = 1


@dataclass(frozen=True)
class Trained:
    """What a training on noisy labels gave.

    Attributes:
        fit: Loss of the first network in the last epoch, and how many given labels it gives now.
        state: What a next training goes on from.
        shares: Weight of each network in the answer.
    """

    fit: Fit
    state: State
    shares: tuple[float, float]


def fit_noisy(
    first: Network,
    second: Network | None,
    shard: ImageSet,
    options: Noisy,
    *,
    epochs: int,
    whole: int | None = None,
    knows: bool = False,
    batch_size: int = 16,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    augment: str = "none",
    seed: int,
    state: Mapping[str, Any] | None = None,
    done: int = 0,
    noted: Noted | None = None,
    on_epoch: Callable[[Record, Callable[[], State]], None] | None = None,
    phase: Phase | None = None,
) -> Trained:
    """Train two networks (in place) on labels of which some are wrong.

    Args:
        first: The network of the teacher; batch norm or dropout where it unlearns.
        second: Its partner; None for `gmm`.
        shard: Private images with the labels as given.
        options: How.
        epochs: Epochs that the schedule of the learning rate is about.
        whole: Epochs of all calls together, of which the last one selects nothing; None: these.
        knows: Whether the partner was pretrained: its head alone learns until
            `options.encoder_from`, and neighbours are looked for by its features.
        batch_size: Labelled images per step, and as many unlabelled ones.
        optimizer: Optimiser and schedule of both networks.
        augment: Recipe of the weak views; the strong ones are RandAugment's.
        seed: Of everything drawn. An epoch's draws depend on it and on the epoch's number.
        state: What an earlier call left, or `on_epoch` has kept; the networks become those in it.
        done: Epochs of this call that are in `state` already.
        noted: What is measured along the way.
        on_epoch: Called after every epoch with its record and a maker of states.
        phase: In which words to complain.

    Raises:
        ValueError: the shard has no images or labels, or a network cannot be trained so.
        RuntimeError: weights, a loss or its gradient are not finite.
    """
    loop = _Loop(
        first, second, shard, options, epochs, whole, knows, batch_size, optimizer, augment, seed,
        noted or Noted(), phase or Phase("the teacher", "lower teachers.optimizer.lr"),
    )  # fmt: skip
    loop.begin(state, done)
    with numerics(first.mean.device, "float32"):
        for _ in range(done, epochs):
            record = loop.epoch()
            if on_epoch is not None:
                on_epoch(record, loop.state)
        return loop.finish()


class _Half:
    """One network of the pair, with what is followed about it."""

    def __init__(self, name: str, network: Network, half_frozen: bool) -> None:
        self.name = name
        self.network = network
        self.learns = [p for p in network.parameters() if p.requires_grad]
        self.half_frozen = half_frozen
        self.copy: Network | None = None
        self.history = torch.zeros(0, 0)
        self.unlearnt = torch.zeros(0, dtype=torch.bool)
        self.mixture: Mixture | None = None
        self.clean = torch.zeros(0)
        self.trainer: Trainer | None = None
        self.pending: Mapping[str, Any] | None = None

    def freeze(self, frozen: bool) -> None:
        """Let the head alone learn, or all of it."""
        self.half_frozen = frozen
        for weight in self.learns:
            weight.requires_grad = not frozen
        if frozen:
            self._head().requires_grad_(requires_grad=True)

    def train(self) -> None:
        """Training mode of what learns: a frozen encoder keeps its statistics."""
        self.network.train(not self.half_frozen)
        if self.half_frozen:
            self._head().train()

    def _head(self) -> torch.nn.Module:
        assert self.network.head_name is not None
        return self.network.body.get_submodule(self.network.head_name)


class _Loop:
    """What lives as long as one call of `fit_noisy`."""

    def __init__(
        self,
        first: Network,
        second: Network | None,
        shard: ImageSet,
        options: Noisy,
        epochs: int,
        whole: int | None,
        knows: bool,
        batch_size: int,
        optimizer: Optimizer,
        augment: str,
        seed: int,
        noted: Noted,
        phase: Phase,
    ) -> None:
        if shard.labels is None or len(shard) == 0:
            raise ValueError("a teacher learns from labelled images, this shard has none")
        if (second is None) != options.alone:
            raise ValueError(f"method {options.method!r}: expected {2 - options.alone} networks")
        check_augmentation(augment)
        self.device = first.mean.device
        self.options, self.optimizer, self.seed = options, optimizer, seed
        self.knows, self.noted, self.phase = knows, noted, phase
        self.epochs, self.whole = epochs, epochs if whole is None else whole
        self.shard, self.total = shard, len(shard)
        self.given = shard.labels
        self.pixels, self.labels = shard.images.to(self.device), shard.labels.to(self.device)
        self.batch_size = min(batch_size, self.total)
        self.per_epoch = max(1, steps_per_epoch(self.total, self.batch_size))
        self.weak = augment
        self.strong = "randaugment_flip" if augment in MIRRORING else "randaugment"
        self.halves = [_Half(FIRST, first, half_frozen=False)]
        if second is not None:
            self.halves.append(_Half(SECOND, second, half_frozen=knows))
        for half in self.halves:
            if self.total > 1:
                check_batch_size(half.network, batch_size, phase.batch_size, phase.who)
        self.number = 0
        self.origin = 0
        self.since: int | None = None
        self.references: References | None = None
        self.trusted = False
        self.curves: list[Record] = []
        self.loss = float("nan")
        self._lowered = False

    # -- state -----------------------------------------------------------------------------

    def begin(self, state: Mapping[str, Any] | None, done: int) -> None:
        """Start, or go on with what was left."""
        nobody = torch.zeros(self.total, dtype=torch.bool)
        if state is None:
            self._look_for_references()
            for half in self.halves:
                half.history, half.unlearnt = torch.zeros(0, self.total), nobody
        else:
            self._take_up(state)
        if self.references is not None and self.options.prior is None:
            self.trusted = self.references.assent > self.options.trust
        self.origin = self.number - done
        for half in self.halves:
            half.freeze(half.half_frozen and self.number < self.options.encoder_from)
            self._make_trainer(half)

    def _take_up(self, state: Mapping[str, Any]) -> None:
        if (kept := len(state["unlearnt"][FIRST])) != self.total:
            raise RuntimeError(
                f"{self.phase.who} followed the losses of {kept} images, now there are {self.total}"
            )
        self.number, self.since = state["epoch"], state["since"]
        self.curves = list(state["curves"])
        if state["reference"] is not None:
            labels, certainty = state["reference"]
            self.references = References.of(labels, certainty, self.given)
        self.loss = state["loss"]
        for half in self.halves:
            half.network.load_state_dict(state["networks"][half.name])
            half.history = state["history"][half.name]
            half.unlearnt = state["unlearnt"][half.name]
            half.pending = state["optimizers"][half.name]
            if (weights := state["copies"].get(half.name)) is not None:
                half.copy = snapshot_of(half.network)
                half.copy.load_state_dict(weights)

    def state(self) -> State:
        """Everything to go on from."""
        return {
            "epoch": self.number,
            "since": self.since,
            "loss": self.loss,
            "curves": list(self.curves),
            "reference": None if (it := self.references) is None else (it.labels, it.certainty),
            "networks": {half.name: _on_cpu(half.network) for half in self.halves},
            "history": {half.name: half.history for half in self.halves},
            "unlearnt": {half.name: half.unlearnt for half in self.halves},
            "copies": {h.name: _on_cpu(h.copy) for h in self.halves if h.copy is not None},
            "optimizers": {
                half.name: None if half.trainer is None else _moved_to_cpu(half.trainer.state())
                for half in self.halves
            },
        }

    def _look_for_references(self) -> None:
        options = self.options
        if not options.neighbours:
            return
        features = embedded(self.halves[1].network, self.pixels) if self.knows else None
        if features is None:
            features = self.pixels.flatten(1).float()
        classes = len(self.shard.classes)
        count = few_neighbours(options.neighbours, self.total)
        labels, certainty = neighbour_labels(features, self.labels, classes, neighbours=count)
        self.references = References.of(labels.cpu(), certainty.cpu(), self.given)

    def _make_trainer(self, half: _Half) -> None:
        half.trainer = Trainer(
            half.network, self.optimizer, self.phase, self.per_epoch * self.epochs
        )
        if half.pending is not None:
            half.trainer.take_up(half.pending)
            half.pending = None

    # -- one epoch -------------------------------------------------------------------------

    def epoch(self) -> Record:
        """Train both networks for an epoch."""
        number, options = self.number, self.options
        record: Record = {"epoch": number + 1}
        if self.references is not None:
            record["assent"] = self.references.assent
        self.draws = Draws(self.seed, self.device)
        self.draws.begin(number)
        with seeded(self.seed, "noisy", number):
            self._prepare(record)
            if number < options.warmup:
                record["phase"] = "warm-up"
                self._warm_up(record)
            elif self.trusted:
                record["phase"] = "plain"
                self._learn_all(record)
            else:
                record["phase"] = "learning"
                self._follow(record)
                if options.unlearns:
                    self._unlearn(record)
                self._learn(record)
        self.number += 1
        self._test(record)
        self.curves.append(record)
        return record

    def finish(self) -> Trained:
        """Look back at the whole training."""
        state = self.state()
        for half in self.halves:
            assert half.trainer is not None
            half.trainer.finish()
            half.freeze(frozen=False)
            half.network.eval()
        given = accuracy(predict(self.halves[0].network, self.pixels), self.given)
        return Trained(Fit(self.loss, given), state, self._shares())

    def _prepare(self, record: Record) -> None:
        """The learning rates of this epoch, and an encoder that learns from now on."""
        for half in self.halves:
            if half.half_frozen and self.number >= self.options.encoder_from:
                half.freeze(frozen=False)
                self._make_trainer(half)  # anew: its moments were those of the head alone
            assert half.trainer is not None
            half.trainer.schedule.seek((self.number - self.origin) * self.per_epoch)
            record.setdefault("lr", half.trainer.lr)

    def _warm_up(self, record: Record) -> None:
        for half in self.halves:
            if self.options.unlearns and half.name == SECOND and self.references is not None:
                classes = self.references.labels.to(self.device)
                certainty = self.references.certainty.to(self.device)

                def measure(
                    step: int,
                    index: Tensor,
                    half: _Half = half,
                    classes: Tensor = classes,
                    certainty: Tensor = certainty,
                ) -> Measured:
                    shown = self._view(index, self.strong, step, half.name)
                    return reference_step(
                        half.network.body(shown), classes[index], certainty[index]
                    )
            else:

                def measure(step: int, index: Tensor, half: _Half = half) -> Measured:  # type: ignore[misc]
                    return self._plain(half, step, index, penalty=self.options.penalty)

            means = self._trained(half, torch.arange(self.total), measure)
            self._note_loss(record, half, means)

    def _learn_all(self, record: Record) -> None:
        """An epoch on a shard of which the neighbours confirm most labels: none is looked for.

        Where classes are rare their right labels have large losses too, and would be dropped.
        """
        for half in self.halves:
            half.clean = torch.ones(self.total)
            rows = torch.arange(self.total)
            means = self._trained(half, rows, partial(self._plain, half))
            self._note_loss(record, half, means)
            self._note_labelled(record, half, torch.ones(self.total, dtype=torch.bool), None, [])

    def _plain(self, half: _Half, step: int, index: Tensor, *, penalty: bool = False) -> Measured:
        shown = self._view(index, self.weak, step, half.name)
        return warmup_step(half.network.body(shown), self.labels[index], penalty=penalty)

    def _follow(self, record: Record) -> None:
        """Each network's losses on the given labels, and what its mixture says of them."""
        for half in self.halves:
            logits = predict(half.network, self.pixels)
            losses = functional.cross_entropy(logits, self.given, reduction="none")
            kept = max(self.options.unlearn.period + 1, self.options.average)
            history = torch.cat([half.history, rescaled(losses)[None]])
            half.history = history[-kept:]
            half.mixture = loss_mixture(
                half.history, average=self.options.average, prior=self.options.prior
            )
            half.clean = torch.ones(self.total) if half.mixture is None else half.mixture.clean
            if self.references is not None:
                half.clean = self.references.corrected(half.clean)
        self._note_judgement(record)

    def _unlearn(self, record: Record) -> None:
        options, number = self.options.unlearn, self.number
        if number % options.period == 0 and options.start < number < self.whole - 1:
            labels = None if self.references is None else self.references.labels
            for half in self.halves:
                half.unlearnt = select_for_unlearning(
                    half.history,
                    self.given,
                    labels,
                    period=options.period,
                    current=options.current,
                    drop=options.drop,
                )
                half.copy = snapshot_of(half.network)
            self.since = number
        if self.since is None:
            return
        if number - self.since < options.length:
            record["phase"] = "unlearning"
            for half in self.halves:
                self._forget(record, half)
        elif number - self.since == options.length:
            for half in self.halves:
                half.copy = None  # nothing is compared with it any more
        self._note_unlearnt(record)

    def _forget(self, record: Record, half: _Half) -> None:
        options, copied = self.options.unlearn, half.copy
        assert copied is not None

        def measure(step: int, index: Tensor) -> Measured:
            shown = self._view(index, self.weak, step, half.name, "forget")
            with torch.no_grad():
                before = copied.body(shown)
            return forget_step(half.network.body(shown), before, temperature=options.temperature)

        rows = half.unlearnt.nonzero()[:, 0]
        means = self._trained(half, rows, measure, options.batch_size, "forget")
        record[f"forget_{half.name}"] = None if means is None else means.loss

    def _learn(self, record: Record) -> None:
        pool = ~torch.stack([half.unlearnt for half in self.halves]).any(dim=0)
        chosen = {}
        for half in self.halves:  # both are judged before one of them has learnt
            judge = self.halves[1 - self.halves.index(half)] if len(self.halves) > 1 else half
            chosen[half.name] = self._labelled(judge.clean, pool)
        for half in self.halves:
            labelled, clean, threshold, lost = chosen[half.name]
            self._note_labelled(record, half, labelled, threshold, lost)
            rest = (pool & ~labelled).nonzero()[:, 0]
            means = self._trained(
                half,
                labelled.nonzero()[:, 0],
                self._learning(half, clean, rest, int(labelled.sum())),
            )
            self._note_loss(record, half, means)

    def _labelled(self, clean: Tensor, pool: Tensor) -> tuple[Tensor, Tensor, float, list[int]]:
        """Which labels are learnt from, and how far each is trusted.

        Returns:
            The labels, the chance of each to be clean, the threshold above which they are, and
            the classes of which none was: their likeliest labels are taken for clean, or the class
            would never come back; but for those that the neighbours contradict, for such a class
            may have no image in the shard.
        """
        threshold = self.options.threshold
        labelled = (clean > threshold) & pool
        wanted = max(2, round(FEWEST * self.total))
        if int(labelled.sum()) < min(2, self.total):
            while int(labelled.sum()) < min(wanted, int(pool.sum())) and threshold > 0:
                threshold = max(threshold - 0.05, 0.0)
                labelled = ((clean > threshold) if threshold > 0 else torch.ones_like(pool)) & pool
            if not int(labelled.sum()):  # all were unlearnt: there is nothing else to learn from
                labelled = torch.ones_like(pool)
            if not self._lowered:
                self._lowered = True
                logger.warning(
                    "no label is clean with a chance above %.2f; the threshold falls to %.2f, at "
                    "which %d of %d are",
                    self.options.threshold, threshold, int(labelled.sum()), self.total,
                )  # fmt: skip
        lost = sorted(set(self.given.tolist()) - set(self.given[labelled].tolist()))
        kept, possible = torch.zeros_like(labelled), pool
        if self.references is not None:
            possible = pool & ~self.references.contradicted
        for name in lost:
            rows = (possible & (self.given == name)).nonzero()[:, 0]
            count = max(1, round(KEPT * len(rows)))
            kept[rows[clean[rows].argsort(descending=True, stable=True)[:count]]] = True
        return labelled | kept, torch.where(kept, 1.0, clean), threshold, lost

    def _learning(
        self, half: _Half, clean: Tensor, rest: Tensor, count: int
    ) -> Callable[[int, Tensor], Measured]:
        """How a batch of labelled images is learnt from by a network."""
        options = self.options
        if options.method in ("coteach", "gmm"):
            return lambda step, index: self._plain(half, step, index)
        alone = options.method == "acdu" and half.name == SECOND
        steps = max(1, sum(1 for _ in batches(torch.arange(count), min(self.batch_size, count))))
        others = [] if alone or not len(rest) else list(self._endless(half, rest, steps))
        clean = clean.float().to(self.device)
        guess: list[Forward] = [self._reader(half.network, options.guess_in)]
        guess += [self._reader(h.network, "eval") for h in self.halves if h is not half]

        def measure(step: int, index: Tensor) -> Measured:
            def views(index: Tensor, recipe: str, *names: object) -> list[Tensor]:
                return [self._view(index, recipe, step, half.name, *names, n) for n in (1, 2)]

            labelled = Labelled(
                views(index, self.weak),
                self.labels[index],
                clean[index],
                views(index, self.strong, "strong") if alone else (),
            )
            unlabelled = views(others[step], self.weak, "unlabelled") if others else []
            moment = self.number + step / (steps + 1)
            rows = sum(map(len, (*(labelled.shown or labelled.views), *unlabelled)))
            return mix_step(
                half.network.body,
                guess,
                labelled,
                unlabelled,
                self._mixed(rows, step, half.name),
                weight=mix_weight(moment, options.warmup, options.mix),
                sharpen=options.mix.sharpen,
            )

        return measure

    def _endless(self, half: _Half, rows: Tensor, steps: int) -> Iterator[Tensor]:
        """A batch of unlabelled images for each step, drawn anew when all have been seen."""
        size = min(self.batch_size, len(rows))
        generator = stream(self.seed, "unlabelled", half.name, self.number)
        left = rows[:0]
        for _ in range(steps):
            if len(left) < size:
                left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
            yield left[:size].to(self.device)
            left = left[size:]

    def _trained(
        self,
        half: _Half,
        rows: Tensor,
        measure: Callable[[int, Tensor], Measured],
        batch_size: int | None = None,
        *names: str,
    ) -> Means | None:
        """One epoch of a network over some images; None if there is no batch of them."""
        assert half.trainer is not None
        generator = stream(self.seed, "order", half.name, *names, self.number)
        order = rows[torch.randperm(len(rows), generator=generator)].to(self.device)
        size = min(batch_size or self.batch_size, max(len(order), 1))
        parts = [index for index in batches(order, size) if not names or len(index) > 1]
        if not parts:
            return None
        half.train()
        if len(order) == 1 and not names:  # batch norm has nothing to compare it with
            half.network.eval()
        means = half.trainer.epoch(self.number + 1, parts, measure)
        half.network.eval()
        return means

    # -- what a batch is made of -----------------------------------------------------------

    def _view(self, index: Tensor, recipe: str, step: int, *names: object) -> Tensor:
        """Images under a recipe, normalised."""
        images = self.pixels[index]
        if recipe != "none":
            images = augmented(images, recipe, self.draws.of(self.number, step, *names))
        return self.halves[0].network.normalise(images)

    def _mixed(self, rows: int, step: int, name: str) -> Mixed:
        beta = self.options.mix.beta
        seed = stream_seed(self.seed, "mix", name, self.number, step)
        drawn = float(np.random.default_rng(seed).beta(beta, beta))
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        return Mixed(max(drawn, 1 - drawn), order.to(self.device))

    @staticmethod
    def _reader(network: Network, mode: str) -> Forward:
        def read(images: Tensor) -> Tensor:
            with in_mode(network, mode):
                logits: Tensor = network.body(images)
            return logits

        return read

    def _shares(self) -> tuple[float, float]:
        """Weight of each network in the answer."""
        if self.options.answer != "weighted" or len(self.halves) < 2:
            return (1.0, 1.0)
        first, second = self.halves
        if not len(first.clean):
            return (1.0, 1.0)
        sure = (first.clean > self.options.threshold) & (second.clean > self.options.threshold)
        if not int(sure.sum()):
            return (1.0, 1.0)
        shown, named = self.pixels[sure.to(self.device)], self.given[sure]
        return agreement_shares(*(accuracy(predict(h.network, shown), named) for h in self.halves))

    # -- what is written down --------------------------------------------------------------

    def _note_loss(self, record: Record, half: _Half, means: Means | None) -> None:
        record[f"loss_{half.name}"] = None if means is None else means.loss
        if half.name == FIRST and means is not None:
            self.loss = means.loss

    def _note_judgement(self, record: Record) -> None:
        half, truth = self.halves[0], self.noted.truth
        losses = half.history[-1]
        groups = {"all": losses} if truth is None else {
            "right": losses[self.given == truth], "wrong": losses[self.given != truth]
        }  # fmt: skip
        record["histogram"] = {
            name: torch.histc(some, BINS, 0, 1).int().tolist() for name, some in groups.items()
        }
        if half.mixture is not None:
            found = half.mixture
            record["mixture"] = [*found.means, *found.deviations, *found.shares]
        for each in self.halves if truth is not None else ():
            assert truth is not None
            record[f"auc_{each.name}"] = auc(each.clean, self.given == truth)

    def _note_labelled(
        self,
        record: Record,
        half: _Half,
        labelled: Tensor,
        threshold: float | None,
        lost: list[int],
    ) -> None:
        record[f"labelled_{half.name}"] = int(labelled.sum())
        if threshold not in (None, self.options.threshold):
            record[f"threshold_{half.name}"] = threshold
        if self.noted.truth is not None:
            right = (self.given == self.noted.truth)[labelled]
            record[f"purity_{half.name}"] = float(right.double().mean())
        if lost:
            record[f"lost_{half.name}"] = [self.shard.classes[row] for row in lost]

    def _note_unlearnt(self, record: Record) -> None:
        for half in self.halves:
            record[f"unlearnt_{half.name}"] = int(half.unlearnt.sum())
            if self.noted.truth is not None and half.unlearnt.any():
                wrong = (self.given != self.noted.truth)[half.unlearnt]
                record[f"wrong_{half.name}"] = float(wrong.double().mean())

    def _test(self, record: Record) -> None:
        test, last = self.noted.test, self.number - self.origin == self.epochs
        if test is None or test.labels is None:
            return
        if not last and self.number % self.noted.every:
            return
        logits = [predict(half.network, test.images) for half in self.halves]
        labels = test.labels.cpu()
        for half, each in zip(self.halves, logits, strict=True):
            record[f"accuracy_{half.name}"] = accuracy(each, labels)
        if len(logits) > 1:
            first, second = self._shares()
            record["accuracy_both"] = accuracy(first * logits[0] + second * logits[1], labels)


def auc(chances: Tensor, right: Tensor) -> float | None:
    """Area under the ROC curve of the chance of being right; None if all are, or none is."""
    positive = int(right.sum())
    if positive in (0, len(right)):
        return None
    _, place, counts = np.unique(chances.numpy(), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    total = float(ranks[right.numpy()].sum()) - positive * (positive + 1) / 2
    return total / (positive * (len(right) - positive))


def _on_cpu(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def _moved_to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _moved_to_cpu(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_moved_to_cpu(each) for each in value]
    return value
