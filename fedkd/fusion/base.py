"""The contract of a fusion rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar, dataclass_transform

import torch
from torch import Tensor

from fedkd.functional.options import options_checked
from fedkd.functional.precision import full_precision
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import AGGREGATE, Bank, Ensemble, Rule

Found = TypeVar("Found")

# Samples that `FitContext.batches` hands over at once.
BATCH = 1024


@dataclass(frozen=True)
class FitContext:
    """What a rule may look at before it judges single samples.

    Attributes:
        bank: The answers of all teachers for the whole transfer set.
        before: The rules that come first in the chain, fitted.
        labels: True classes (N,) of a labelled transfer set, or None.
        validation: Their answers for the server's own labelled images, or None.
        validation_labels: Their classes.
        student: Logits of the student as it was before this round, (N, C), or None.
        state: What the rule itself kept from the last round; empty in the first.
        seed: Of everything the rule draws.
        device: Where rules look at the answers.
    """

    bank: Bank
    before: tuple[Rule, ...] = ()
    labels: Tensor | None = None
    validation: Bank | None = None
    validation_labels: Tensor | None = None
    student: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    device: torch.device | str = "cpu"

    def only(self, clients: Collection[int]) -> FitContext:
        """The same of some clients' teachers."""
        checked = None if self.validation is None else self.validation.only(clients)
        return replace(self, bank=self.bank.only(clients), validation=checked)

    def batches(self) -> Iterator[tuple[Tensor, Ensemble]]:
        """Indices and what the rules before left of those samples, the whole set in order."""
        yield from self._walk(self.bank)

    def validation_batches(self) -> Iterator[tuple[Tensor, Ensemble]]:
        """The same for the server's labelled images; nothing if there are none."""
        if self.validation is not None:
            yield from self._walk(self.validation)

    def _walk(self, bank: Bank) -> Iterator[tuple[Tensor, Ensemble]]:
        kinds = bank.fusible
        for start in range(0, bank.num_samples, BATCH):
            here = slice(start, min(start + BATCH, bank.num_samples))
            ensemble = bank.rows(here, self.device, kinds=kinds)
            for rule in self.before:
                ensemble = rule(ensemble)
            yield torch.arange(here.start, here.stop), ensemble


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class Fusion(ABC):
    """One rule that combines the answers of many teachers: `Ensemble -> Ensemble`.

    Rules chain: each sees what the one before it left. Called, a rule sees every sample on its own
    (its result must not depend on which other samples are in the ensemble) and keeps the columns
    of `weights` summing to one. What it has to know of the whole set, of labelled images or of
    earlier rounds it learns in `fit`.

    A rule is a dataclass without being called one: its fields are its options, those with
    `field(init=False)` what `fit` found.

    Attributes:
        discloses: Metadata the rule needs from clients: `num_examples`, `class_counts`.
        needs: Kinds of knowledge the rule reads beside the logits.
        needs_validation: Whether teachers must answer the server's labelled images too.
        needs_student: Whether the rule looks at the student's predictions.
        partial: Whether the rule does right by teachers that know a part of the classes.
        completes: Whether what it leaves knows all classes, whatever came in.
    """

    discloses: tuple[str, ...] = ()
    needs: tuple[Kind, ...] = ()
    needs_validation: bool = False
    needs_student: bool = False
    partial: bool = False
    completes: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make it a dataclass, whose fields are checked; keep autocast out.

        Half precision does not sum to one.
        """
        super().__init_subclass__(**kwargs)
        dataclass(kw_only=True, eq=False)(cls)
        name = cls.__module__.rpartition("fedkd.fusion.")[2]
        own = name == cls.__module__ or "." in name
        who = cls.__name__ if own else f"fusion {name!r}"
        type.__setattr__(cls, "__init__", options_checked(who)(cls.__init__))
        for name in ("__call__", "fit"):
            if name in cls.__dict__:
                type.__setattr__(cls, name, full_precision(cls.__dict__[name]))

    def fit(self, context: FitContext) -> Self:
        """This rule made ready for a round; itself if it judges samples by themselves.

        Raises:
            ValueError: the context lacks what the rule needs; the message says how to give it.
        """
        return self

    @property
    def state(self) -> dict[str, Tensor]:
        """What this fitted rule wants to know again in the next round, as plain tensors."""
        return {}

    def known(self, found: Found | None) -> Found:
        """What `fit` found. Raises `RuntimeError` if the rule was not fitted."""
        if found is None:
            raise RuntimeError(
                f"fusion {type(self).__name__} has to see the whole transfer set: use fit_rules"
            )
        return found

    @abstractmethod
    def __call__(self, ensemble: Ensemble) -> Ensemble:
        """Reweight or merge the teachers."""


Combine = Callable[[Tensor, Tensor], Tensor]
"""Probabilities (M, B, C) and weights (M, B), whose columns sum to one, to probabilities (B, C)."""


def mean(probabilities: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over teachers: (M, B, C), (M, B) -> (B, C)."""
    return torch.einsum("mb,mbc->bc", weights, probabilities)


def merged(ensemble: Ensemble, combine: Combine) -> Ensemble:
    """One teacher with the answers that `combine` makes of all of them, in every view.

    Its logits are log-probabilities. What is not logits cannot be combined and is dropped.
    """
    tensors: dict[Kind, Tensor | Sequence[Tensor]] = {}
    for kind, logits in ensemble.tensors.items():
        if kind.logits and isinstance(logits, Tensor):
            together = combine(torch.softmax(logits.float(), dim=-1), ensemble.weights)
            tensors[kind] = together.clamp(min=1e-12).log()[None]
    return Ensemble((AGGREGATE,), tensors, torch.ones_like(ensemble.weights[:1]))


AnyRule = TypeVar("AnyRule", bound=Rule)


def check_partial(rules: Sequence[Rule]) -> bool:
    """Whether teachers that know a part of the classes become one that knows all by these rules.

    Raises:
        ValueError: a rule would take a class that a teacher does not know for an unlikely one.
    """
    for rule in rules:
        if not getattr(rule, "partial", False):
            name = type(rule).__module__.rpartition(".")[2]
            raise ValueError(
                f"fusion {name!r} takes every teacher to know every class, and these know a part "
                "of them; put 'specialists' before it, or take uniform, entropy, sample_count, "
                "class_gated or density_ratio"
            )
        if getattr(rule, "completes", False):
            return True
    return False


def fit_rules(
    rules: Sequence[AnyRule], context: FitContext, states: Sequence[Mapping[str, Tensor]] = ()
) -> list[AnyRule]:
    """Fit a chain, each rule to what those before it leave.

    Args:
        rules: In order. Any `Ensemble -> Ensemble` callable is passed through.
        context: Without `before` and `state`, which are set here.
        states: What each rule kept from the last round; empty for a first round.
    """
    if any(teacher.knows is not None for teacher in context.bank.teachers):
        check_partial(rules)
    ready: list[AnyRule] = []
    for number, rule in enumerate(rules):
        if isinstance(rule, Fusion):
            state = states[number] if number < len(states) else {}
            rule = rule.fit(replace(context, before=tuple(ready), state=state))
        ready.append(rule)
    return ready
