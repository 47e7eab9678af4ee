"""The contract of a distillation loss: what it needs, what it reads, how it matches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedkd.knowledge.kinds import Kind

Tensors = Mapping[Kind, Tensor]


@dataclass(frozen=True)
class Trust:
    """How far one teacher is trusted on one batch.

    Attributes:
        samples: Its weight on each sample, (B,), in [0, 1]; over all teachers the weights of a
            sample sum to one.
        classes: Trust in its view of each class, (C,), in [0, 1]; None means full trust. Losses
            over a class graph gate their edges with it.
    """

    samples: Tensor
    classes: Tensor | None = None


class DistillationLoss(nn.Module, ABC):
    """One term of the objective: the student against one teacher on one batch.

    Attributes:
        needs: Kinds every teacher must share; the union over all losses is what clients send.
        needs_targets: Whether `targets` (true or pseudo labels) are used.
    """

    needs: tuple[Kind, ...] = ()
    needs_targets: bool = False

    @property
    def reads(self) -> tuple[Kind, ...]:
        """Kinds read from the student; the same as `needs` unless the loss projects first."""
        return self.needs

    @abstractmethod
    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, trust: Trust
    ) -> Tensor:
        """Match `student` to one `teacher`.

        Args:
            student: Kind -> tensor with gradient, first axis B.
            teacher: Kind -> detached tensor, first axis B.
            targets: Class indices (B,), or None if `needs_targets` is False.
            trust: This teacher's weights on samples and classes.

        Returns:
            Per-sample losses (B,), which the objective weights by `trust.samples` and averages;
            or a scalar if the loss does not decompose over samples, which must then have
            applied `trust` itself.
        """
