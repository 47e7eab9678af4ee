"""The contract of a loss: what it needs, what it reads, how it matches.

Two kinds of losses share it. A `DistillationLoss` compares the student with one teacher at a time
and leaves the sum over teachers to the objective. An `EnsembleLoss` sees all teachers at once,
because what it asks of one depends on the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from inspect import signature, unwrap
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from fedkd.functional.options import frozen_options, options_checked, with_options_of
from fedkd.knowledge.kinds import Kind, Logits
from fedkd.knowledge.payload import Ensemble

Tensors = Mapping[Kind, Tensor]


@dataclass(frozen=True)
class TeacherWeights:
    """How far one teacher is trusted on one batch.

    Attributes:
        samples: Its weight on each sample, (B,), in [0, 1]; over all teachers the weights of a
            sample sum to one.
        classes: Weights of its view of each class, (C,), in [0, 1]; None means full weight. Losses
            over a class graph gate their edges with it.
    """

    samples: Tensor
    classes: Tensor | None = None


class Loss(nn.Module, ABC):
    """What every loss has in common.

    All losses keep one rule for what they are given, as functions and as terms of an objective
    (`fedkd.losses.inputs`):

    - All tensors are of one batch, which is not empty; nothing is broadcast. Logits have two
      classes or more. Targets are class numbers of any integer dtype, all in range. Options are
      known words and finite numbers. Else `ValueError`.
    - A logit of -inf is a masked class. Where the loss has a limit it is taken: a class masked by
      both might as well be missing, one that only the student masks makes the loss infinite. Where
      it has none (relations of logits, z-scores), a teacher's -inf is a `ValueError`.
    - NaN and inf are never hidden: the value is not finite either. If they are the teacher's, a
      CPU raises `ValueError`; a GPU, which would have to wait for the look, gives the value.
    - A finite value has a finite gradient, also where samples or features coincide.
    - Autocast is kept out, half precision computed in float32, and all but the student's detached.
    - Derivatives of any order and mode exist, though only the first in reverse mode is fast.

    A loss is written `class DKDLoss(FormulaLoss, formula=dkd_loss)`: the keywords of its
    formula are its options, for Python and for configs, and nobody lists them again. What a loss
    wants to know beside them it names in an `__init__` of its own, which hands on the rest.

    Attributes:
        Options: The options of the formula, a frozen dataclass.
        options: Those that were chosen; `formula(..., **vars(self.options))`.
        needs: Kinds every teacher must share; the union over all losses is what clients send.
        needs_targets: Whether `targets` (true or pseudo labels) are used.
        partial: Whether it does right by a teacher that knows a part of the classes, whose other
            logits are -inf. What has no axis of the teacher's classes does so anyway.
    """

    needs: tuple[Kind, ...] = ()
    needs_targets: bool = False
    partial: bool = False

    Options: ClassVar[type[Any]] = make_dataclass("Options", [], frozen=True)
    options: Any
    formula: ClassVar[Callable[..., Tensor]]
    _asked: ClassVar[frozenset[str]]

    def __init_subclass__(cls, formula: Callable[..., Tensor] | None = None, **kwargs: Any) -> None:
        """Take the options of `formula`, and check all options before the constructor runs."""
        super().__init_subclass__(**kwargs)
        if formula is None and "__init__" not in cls.__dict__:
            return
        init = unwrap(cls.__init__)
        if formula is not None:
            cls.formula, cls._asked = (
                staticmethod(formula),
                frozenset(signature(formula).parameters),
            )
            cls.Options = frozen_options(cls, formula)
            init = with_options_of(formula, init)
        name = cls.__module__.rpartition("fedkd.losses.")[2]
        who = f"loss {name!r}" if "." not in name and name != cls.__module__ else cls.__name__
        type.__setattr__(cls, "__init__", options_checked(who)(init))

    def __init__(self, **formula: Any) -> None:
        super().__init__()
        self.options = self.Options(**formula)

    @property
    def reads(self) -> tuple[Kind, ...]:
        """Kinds read from the student; what it needs of teachers unless it projects first."""
        return tuple(kind for kind in self.needs if kind.per_sample)


class DistillationLoss(Loss, ABC):
    """One term of the objective: the student against one teacher on one batch."""

    def adapted(self, student: Tensors, teacher: Tensors) -> Self:
        """This loss made ready for one student and one teacher; itself if nothing depends on them.

        A loss that owns parameters (such as a regressor between two widths) returns a copy with
        parameters of the right shapes; the objective keeps one copy per teacher and trains it
        along with the student. Called with a few samples, without gradient and under a seed of its
        own, so initial weights may be drawn freely.

        Args:
            student: An example of what it reads, first axis a few samples.
            teacher: An example of what it needs.

        Raises:
            ValueError: the two cannot be compared (sizes of maps, numbers of stages).
        """
        return self

    def together(
        self, student: Tensors, ensemble: Ensemble, targets: Tensor | None
    ) -> list[Tensor] | None:
        """What `forward` gives for each teacher, if it is known in one go; None if not.

        Args:
            student: As in `forward`.
            ensemble: All teachers.
            targets: As in `forward`.
        """
        return None

    @abstractmethod
    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Match `student` to one `teacher`.

        Args:
            student: Kind -> tensor with gradient, first axis B.
            teacher: Kind -> detached tensor, first axis B (but for facts).
            targets: Class indices (B,), or None if `needs_targets` is False.
            weights: This teacher's weights on samples and classes.

        Returns:
            Per-sample losses (B,), which the objective weights by `weights.samples` and averages;
            or a scalar if the loss does not decompose over samples, which must then have
            applied `weights` itself.
        """


class FormulaLoss(DistillationLoss, ABC):
    """A loss that is its formula of what it reads, what it needs, and what else that asks for."""

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,), or a scalar, `weights` applied."""
        more = {"targets": targets, "weights": weights.samples, "class_weights": weights.classes}
        return self.formula(
            *(student[kind] for kind in self.reads),
            *(teacher[kind] for kind in self.needs),
            **{name: value for name, value in more.items() if name in self._asked},
            **vars(self.options),
        )


class EnsembleLoss(Loss, ABC):
    """One term of the objective: the student against all teachers on one batch.

    Attributes:
        meta_every: After how many steps of training `meta_step` is called; 0 means never.
    """

    meta_every: int = 0

    def adapted(self, student: Tensors, teachers: Sequence[Tensors]) -> Self:
        """As `DistillationLoss.adapted`, for all teachers in the ensemble's order."""
        return self

    @abstractmethod
    def forward(self, student: Tensors, ensemble: Ensemble, targets: Tensor | None) -> Tensor:
        """Match `student` to all teachers.

        Args:
            student: Kind -> tensor with gradient, first axis B.
            ensemble: The fused teachers on the batch, detached. Its weights (M, B), columns
                summing to one, are what fusion rules found; a rule of the loss's own multiplies
                them (`ensemble.weighted`).
            targets: Class indices (B,), or None if `needs_targets` is False.

        Returns:
            Per-sample losses (B,), which the objective averages, or a scalar.
        """

    def meta_step(
        self,
        student_forward: Callable[[dict[str, Tensor]], Tensors],
        parameters: Mapping[str, Tensor],
        ensemble: Ensemble,
        targets: Tensor,
        lr: float,
    ) -> Tensor:
        """Learn how to weigh teachers; only called if `meta_every` is set.

        Args:
            student_forward: Parameters of the student -> its readings on the batch with them.
            parameters: Its parameters as they are.
            ensemble: The teachers on a batch that the student gets wrong.
            targets: Classes of the batch, (B,).
            lr: The student's learning rate.

        Returns:
            What was minimised, a scalar.
        """
        raise NotImplementedError


class FormulaEnsembleLoss(EnsembleLoss, ABC):
    """A loss of all teachers' logits that is its formula."""

    needs = (Logits(),)

    def forward(self, student: Tensors, ensemble: Ensemble, targets: Tensor | None) -> Tensor:
        """Losses (B,)."""
        weights = ensemble.weights
        return self.formula(
            student[Logits()], ensemble.logits, weights=weights, **vars(self.options)
        )
