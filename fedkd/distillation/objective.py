"""Fused teachers x weighted losses: what the student minimises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkd.data.heads import Heads
from fedkd.knowledge.kinds import Kind, Logits
from fedkd.knowledge.payload import Ensemble
from fedkd.losses.base import DistillationLoss, EnsembleLoss, TeacherWeights
from fedkd.models.arguments import real, several, whole
from fedkd.models.network import shown
from fedkd.randomness import seeded


@dataclass(frozen=True)
class Term:
    """One loss of the objective; epochs count from 1.

    Attributes:
        name: Its name in logs.
        loss: The loss.
        weight: Its weight at full strength.
        warmup: Epochs over which the weight rises linearly to full; 0 means at once.
        start: First epoch in which it counts.
        stop: Last epoch in which it counts; None means to the end.
        decay_from: Epoch after which the weight falls to zero at the end along a cosine.
        head: The head that it is about, where the student has several.

    Raises:
        ValueError: one of these is none; the message begins with its name.
    """

    name: str
    loss: DistillationLoss | EnsembleLoss
    weight: float = 1.0
    warmup: int = 0
    start: int = 1
    stop: int | None = None
    decay_from: int | None = None
    head: str | None = None

    def headless(self) -> str | None:
        """Why it cannot be a term of a student with several heads; None if it can."""
        loss, kinds = self.loss, (*self.loss.needs, *self.loss.reads)
        for kind in kinds:
            if kind.by_class and not kind.logits:
                return (
                    f"compares {kind}, which belongs to one classifier of all classes, and "
                    "student.heads has several: take a loss over logits, or over features"
                )
        if isinstance(loss, EnsembleLoss) and loss.meta_every:
            return (
                "learns what teachers are worth by one answer to each image, and student.heads "
                "gives several: take a loss that learns nothing by itself"
            )
        if self.head is None and (loss.needs_targets or any(kind.by_class for kind in kinds)):
            return (
                "compares classes, and one softmax over those of several heads means nothing: "
                f"say which head, {{name: {self.name.split('.')[0]}, head: ...}}"
            )
        return None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name: expected the name of a term, got {self.name!r}")
        if not isinstance(self.loss, DistillationLoss | EnsembleLoss):
            given = repr(self.loss) if isinstance(self.loss, str) else shown(self.loss)
            hint = "; make one, with ()" if isinstance(self.loss, type) else ""
            raise ValueError(
                f"loss: expected a DistillationLoss or an EnsembleLoss, got {given}{hint}"
            )
        real("weight", self.weight, 0)
        whole("warmup", self.warmup, 0)
        whole("start", self.start, 1)
        if self.stop is not None:
            whole("stop", self.stop, 1)
        if self.decay_from is not None:
            whole("decay_from", self.decay_from, 0)

    def counts_in(self, epoch: int) -> bool:
        """Whether `epoch` lies between start and stop."""
        return self.start <= epoch and (self.stop is None or epoch <= self.stop)

    def weight_at(self, epoch: int, epochs: int) -> float:
        """Weight in `epoch` of `epochs`; 0 where the term does not count.

        DKD warms up this way (Zhao et al. 2022), WKD decays (Lv et al. 2024), FitNets train
        their hint first and the rest afterwards (Romero et al. 2015).
        """
        if not self.counts_in(epoch):
            return 0.0
        weight = self.weight
        if self.warmup:
            weight *= min((epoch - self.start + 1) / self.warmup, 1.0)
        if self.decay_from is not None and epoch > self.decay_from:
            progress = (epoch - self.decay_from) / max(epochs - self.decay_from, 1)
            weight *= 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return weight


@dataclass(frozen=True)
class Value:
    """What an objective makes of one batch.

    Attributes:
        total: The weighted sum, a scalar.
        terms: Each counting term's own value, unweighted.
        weights: Their weights in this epoch.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]


class Objective(nn.Module):
    """A weighted sum of losses over all teachers of an ensemble.

    A loss that looks at no teacher (cross entropy on the targets) is counted once; one that
    compares with a single teacher is summed over the teachers with their weights; one that sees
    the whole ensemble weighs the teachers itself.

    Raises:
        ValueError: there is no term, or something else among them.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if isinstance(terms, Sequence) and not terms:
            raise ValueError("an objective needs at least one loss")
        self.terms = tuple(several("terms", terms, "fedkd.Term"))
        for place, term in enumerate(self.terms):
            if not isinstance(term, Term):
                raise ValueError(
                    f"terms[{place}]: expected a fedkd.Term, got {shown(term)}; write "
                    "fedkd.Term(name, loss)"
                )
        self.losses = nn.ModuleList(term.loss for term in terms)
        self.adapted = nn.ModuleDict()
        #: Of the student, where it has several.
        self.heads: Heads | None = None

    @property
    def needs(self) -> tuple[Kind, ...]:
        """Kinds every teacher must share: the clients' order list.

        Logits are always among them: the fused answers are made of them.
        """
        return _union([(Logits(),), *(term.loss.needs for term in self.terms)])

    @property
    def reads(self) -> tuple[Kind, ...]:
        """Kinds read from the student."""
        return _union(term.loss.reads for term in self.terms)

    def wanting(self, kind: Kind) -> str:
        """Who asks for a kind, for messages: `" (needed by loss 'rkd')"`, or nothing."""
        names = [t.name for t in self.terms if kind in (*t.loss.needs, *t.loss.reads)]
        if not names:
            return ""
        return f" (needed by loss{'es' * (len(names) > 1)} {', '.join(map(repr, names))})"

    def reads_in(self, epoch: int) -> tuple[Kind, ...]:
        """Kinds read from the student by the losses that count in `epoch`."""
        return _union(term.loss.reads for term in self.terms if term.counts_in(epoch))

    def learners_in(self, epoch: int) -> list[EnsembleLoss]:
        """Losses counting in `epoch` that learn by steps of their own."""
        found = []
        for number, term in enumerate(self.terms):
            loss = self._together(number, term.loss)
            if term.counts_in(epoch) and isinstance(loss, EnsembleLoss) and loss.meta_every:
                found.append(loss)
        return found

    def weights_in(self, epoch: int, epochs: int) -> dict[str, float]:
        """Name -> weight of each term that counts in `epoch`."""
        return {t.name: t.weight_at(epoch, epochs) for t in self.terms if t.counts_in(epoch)}

    def check(self, epochs: int) -> None:
        """Refuse losses that would never count.

        Raises:
            ValueError: there is an epoch without any loss, a loss without any epoch, or all
                weights are 0.
        """
        for term in self.terms:
            last = epochs if term.stop is None else min(term.stop, epochs)
            if term.start > last:
                raise ValueError(
                    f"loss {term.name!r} never counts: it starts in epoch {term.start}, and the "
                    f"last one for it is {last}; look at start, stop and epochs"
                )
        if not any(
            term.weight_at(epoch, epochs) > 0
            for term in self.terms
            for epoch in range(1, epochs + 1)
        ):
            raise ValueError(
                "every loss has weight 0 in every epoch: nothing would be learnt; raise a weight"
            )
        for epoch in range(1, epochs + 1):
            if not any(term.counts_in(epoch) for term in self.terms):
                raise ValueError(
                    f"no loss counts in epoch {epoch} of {epochs}: look at start and stop"
                )

    def check_partial(self) -> None:
        """Refuse losses that take every teacher to know every class.

        Raises:
            ValueError: there is one; the message names it.
        """
        for term in self.terms:
            if term.head is not None:  # among those that know it, and on its classes alone
                continue
            if not term.loss.partial and any(kind.by_class for kind in term.loss.needs):
                raise ValueError(
                    f"loss {term.name!r} takes every teacher to know every class, and these know a "
                    "part of them: put fusion 'specialists' before it, or take 'subset_kd'"
                )

    @torch.no_grad()
    def adapt(self, student: Mapping[Kind, Tensor], ensemble: Ensemble, seed: int) -> None:
        """Fit losses with parameters of their own (regressors, ...) to student and teachers.

        Args:
            student: An example of what is read from the student.
            ensemble: The same samples as the teachers see them.
            seed: Seed of the new parameters, which are drawn per term and client, so that one
                client's absence does not change another's regressor.
        """
        if any(teacher.knows is not None for teacher in ensemble.teachers):
            self.check_partial()
        self.adapted.clear()
        device = ensemble.weights.device
        whole = student, ensemble
        for number, term in enumerate(self.terms):
            loss = term.loss
            student, ensemble, _ = self._seen(term, *whole, None)
            teachers = [ensemble.teacher(m) for m in range(len(ensemble))]
            if isinstance(loss, EnsembleLoss):
                # Named after its teachers: what it knows of these is wrong for others.
                everyone = "_".join(who.key for who in ensemble.teachers)
                with seeded(seed, "adapt", term.name):
                    self._keep(f"{number}-all-{everyone}", loss, loss.adapted(student, teachers))
            elif loss.needs:
                for who, teacher in zip(ensemble.teachers, teachers, strict=True):
                    with seeded(seed, "adapt", term.name, who.key):
                        copy = loss.adapted(student, teacher)
                    self._keep(f"{number}-{who.key}", loss, copy)
        self.adapted.to(device)

    def forward(
        self,
        student: Mapping[Kind, Tensor],
        ensemble: Ensemble,
        targets: Tensor | None,
        epoch: int,
        epochs: int,
        shares: Mapping[str, Tensor] | None = None,
    ) -> Value:
        """The objective on one batch of `epoch` (from 1) of `epochs`.

        Args:
            student: What was read from the student.
            ensemble: The teachers.
            targets: Classes (B,), or None.
            epoch: From 1.
            epochs: Of the whole training.
            shares: The terms' weights as tensors, for steps captured in another epoch.
        """
        terms: dict[str, Tensor] = {}
        weights = self.weights_in(epoch, epochs)
        by: Mapping[str, Tensor | float] = weights if shares is None else shares
        total: Tensor | None = None
        for number, term in enumerate(self.terms):
            if not term.counts_in(epoch):
                continue
            terms[term.name] = self._value(number, student, ensemble, targets)
            part = by[term.name] * terms[term.name]
            total = part if total is None else total + part
        if total is None:
            raise ValueError(f"no loss counts in epoch {epoch}")
        return Value(total, terms, weights)

    def _value(
        self,
        number: int,
        student: Mapping[Kind, Tensor],
        ensemble: Ensemble,
        targets: Tensor | None,
    ) -> Tensor:
        loss = self.terms[number].loss
        student, ensemble, targets = self._seen(self.terms[number], student, ensemble, targets)
        if isinstance(loss, EnsembleLoss):
            value: Tensor = self._together(number, loss)(student, ensemble, targets)
            return value.mean()
        if not loss.needs:
            everyone = ensemble.weights.sum(dim=0)
            return _mean(loss(student, {}, targets, TeacherWeights(everyone)), everyone)
        classes = ensemble.class_weights
        parts = []
        alone = not any(key.startswith(f"{number}-") for key in self.adapted)
        if alone and len(ensemble) > 1:
            found = loss.together(student, ensemble, targets)
            parts = [_mean(v, w) for v, w in zip(found or (), ensemble.weights)]
        if parts:
            return _sum(parts)
        for m, (who, weights) in enumerate(zip(ensemble.teachers, ensemble.weights, strict=True)):
            loss_here = self._adapted(f"{number}-{who.key}", loss)
            teacher_weights = TeacherWeights(weights, None if classes is None else classes[m])
            parts.append(
                _mean(loss_here(student, ensemble.teacher(m), targets, teacher_weights), weights)
            )
        return _sum(parts)

    def _seen(
        self,
        term: Term,
        student: Mapping[Kind, Tensor],
        ensemble: Ensemble,
        targets: Tensor | None,
    ) -> tuple[Mapping[Kind, Tensor], Ensemble, Tensor | None]:
        """What a term is shown: of a head its own classes, the teachers that know it, its labels.

        Raises:
            ValueError: no teacher knows the head that the term compares with one.
        """
        if self.heads is None or term.head is None:
            return student, ensemble, targets
        span = self.heads.spans[term.head]
        own = {k: values[..., span] if k.logits else values for k, values in student.items()}
        if targets is not None:
            targets = targets[:, self.heads.names.index(term.head)]
        if term.loss.needs:
            ensemble = ensemble.among(span)
            if not len(ensemble):
                raise ValueError(
                    f"loss {term.name!r}: no teacher knows the classes of head {term.head!r}"
                )
        return own, ensemble, targets

    def _keep(self, key: str, loss: nn.Module, copy: nn.Module) -> None:
        if copy is not loss:
            self.adapted[key] = copy

    def _together(self, number: int, loss: nn.Module) -> nn.Module:
        """The copy of a loss over all teachers."""
        keys = (key for key in self.adapted if key.startswith(f"{number}-all-"))
        return self._adapted(next(keys, ""), loss)

    def _adapted(self, key: str, loss: nn.Module) -> nn.Module:
        if key in self.adapted:
            return self.adapted[key]
        return loss


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _mean(value: Tensor, weights: Tensor) -> Tensor:
    """Reduction, written once: per-sample losses are weighted and averaged, scalars are done."""
    return value if value.ndim == 0 else (value * weights).mean()


def _union(groups: Iterable[tuple[Kind, ...]]) -> tuple[Kind, ...]:
    kinds: dict[Kind, None] = {}
    for group in groups:
        kinds.update(dict.fromkeys(group))
    return tuple(kinds)
