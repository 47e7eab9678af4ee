"""Several teachers, weighed by a small network that learns whom the student gains from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedkd.functional.options import Count, Positive
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble
from fedkd.losses import LOSSES
from fedkd.losses.base import EnsembleLoss, Tensors
from fedkd.losses.divergence import (
    check_teachers,
    kl_to_teachers,
    prior,
    reweighted,
    squared_distances,
)
from fedkd.losses.inputs import check_batch, class_numbers, loss_function
from fedkd.losses.kd import comparable


@loss_function("mmkd")
def mmkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    shares: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: Positive = 4.0,
) -> Tensor:
    """T^2 * sum of share * KL(teacher || student) per sample -> (B,).

    If the shares ask for a gradient it is differentiable by them, and as often as you like.

    Args:
        student_logits: (B, C).
        teacher_logits: Of M teachers, (M, B, C).
        shares: What the network finds, (M, B), of each sample summing to one.
        weights: What else speaks for each teacher on each sample, (M, B); None: nothing.
        temperature: Softness of all distributions.
    """
    check_teachers("mmkd", student_logits, teacher_logits, weights)
    check_teachers("mmkd", student_logits, teacher_logits, shares)
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    shares = shares.to(student_logits.dtype)
    if weights is not None:
        shares = reweighted(prior(weights, teacher_logits), shares)
    if not shares.requires_grad:
        return kl_to_teachers(student_logits, teacher_logits, shares, temperature=temperature)
    log_p = F.log_softmax(student_logits / temperature, dim=-1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=-1)
    q = log_q.exp()
    kl = log_q.mul_(q).sum(dim=-1) - torch.einsum("mbc,bc->mb", q, log_p)
    return temperature**2 * (shares * kl).sum(dim=0)


@loss_function("mmkd")
def mmkd_feature_loss(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], shares: Tensor
) -> Tensor:
    """Sum of share * mean squared distance of maps per sample, M maps (B, ...) each -> (B,)."""
    for ours, theirs in zip(student_maps, teacher_maps, strict=True):
        check_batch("mmkd", ours, theirs, weights=shares[0])
    distances = squared_distances(student_maps, teacher_maps)
    return (shares.to(distances.dtype) * distances).sum(dim=0)


def logit_shares(student_logits: Tensor, teacher_logits: Tensor, *network: Tensor) -> Tensor:
    """What the weight network makes of all logits, side by side, (B, C) x (M, B, C) -> (M, B).

    Args:
        student_logits: Detached.
        teacher_logits: Detached.
        network: Weight and bias of its first layer, on (M + 1) * C numbers, and of its second;
            the gradient reaches these alone.
    """
    return _shares([*teacher_logits, student_logits], *network)


def feature_shares(student_map: Tensor, teacher_maps: Sequence[Tensor], *network: Tensor) -> Tensor:
    """What the weight network makes of how like each other samples are, (B, ...) -> (M, B).

    Its input are rows of inner products between samples, so it fits one size of batch only.

    Args:
        student_map: Of any shape, detached.
        teacher_maps: M of them, of any shapes, detached.
        network: Weight and bias of its first layer, on (M + 1) * B numbers, and of its second.
    """
    flat = [maps.detach().flatten(1) for maps in (*teacher_maps, student_map)]
    return _shares([rows @ rows.T for rows in flat], *network)


def _shares(
    state: Sequence[Tensor], weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    seen = torch.cat([part.detach().to(weight1.dtype) for part in state], dim=1)
    hidden = torch.relu(F.linear(seen, weight1, bias1))
    return torch.softmax(F.linear(hidden, weight2, bias2), dim=1).T


@LOSSES.register("mmkd")
class MMKDLoss(EnsembleLoss, formula=mmkd_loss):
    """Matches all teachers with weights that a small network learns. Needs labels to learn them.

    The network sees everybody's logits. It does not learn from this loss, which it could lower by
    preferring teachers like the student, but by `meta_step`: the training loop calls that after
    every `meta_every` steps, with samples that the student gets wrong.

    Args:
        hidden: Width of the network; None takes half of its input, as published.
        meta_every: Steps of training between two of the network.
        meta_lr: Learning rate of the network.
        meta_weight_decay: Weight decay of the network.
        formula: Options of `mmkd_loss`.

    References:
        Zhang et al., "Adaptive Multi-Teacher Knowledge Distillation with Meta-Learning",
            ICME 2023, https://arxiv.org/abs/2306.06634
    """

    needs = (Logits(),)
    needs_targets = True
    moments: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        hidden: Count | None = None,
        meta_every: Count = 5,
        meta_lr: float = 1e-3,
        meta_weight_decay: float = 1e-4,
        **formula: Any,
    ) -> None:
        super().__init__(**formula)
        self.hidden = hidden
        self.meta_every = meta_every
        self.meta_lr = meta_lr
        self.meta_weight_decay = meta_weight_decay
        self.network: nn.Sequential | None = None

    def adapted(self, student: Tensors, teachers: Sequence[Tensors]) -> Self:
        """With a weight network for so many teachers and classes."""
        seen = (len(teachers) + 1) * student[Logits()].shape[1]
        hidden = self.hidden or seen // 2
        ready = copy.deepcopy(self)
        network = nn.Sequential(
            nn.Linear(seen, hidden), nn.ReLU(), nn.Linear(hidden, len(teachers))
        )
        # Out of reach of the student's optimizer: Adam of its own, kept in buffers so that an
        # interrupted run goes on with the same moments.
        ready.network = network.requires_grad_(False)
        size = sum(parameter.numel() for parameter in network.parameters())
        ready.register_buffer("moments", torch.zeros(2, size))
        ready.register_buffer("steps", torch.zeros(()))
        return ready

    def forward(self, student: Tensors, ensemble: Ensemble, targets: Tensor | None) -> Tensor:
        """Losses (B,)."""
        assert self.network is not None, "adapt it to student and teachers first"
        return self._match(student, ensemble, *self.network.parameters())

    def meta_step(
        self,
        student_forward: Callable[[dict[str, Tensor]], Tensors],
        parameters: Mapping[str, Tensor],
        ensemble: Ensemble,
        targets: Tensor,
        lr: float,
    ) -> Tensor:
        """One step of the weight network: what weights would have made the student err less?

        From where the student is, it takes two steps of gradient descent on this loss and one on
        cross entropy. The cross entropy where it arrives is differentiated through all three by
        the network's weights, which Adam then moves. The student itself stays where it is.

        Args:
            student_forward: Parameters of the student -> its readings on the batch, `Logits()`
                among them, computed with exactly these parameters (`torch.func.functional_call`)
                and differentiable. It is called four times; if it runs batch norm in training
                mode, give it copies of the buffers, which it would change.
            parameters: The student's trainable parameters by name; neither they nor their `grad`
                change.
            ensemble: The teachers on the batch; as many as this loss is adapted to.
            targets: Classes of the batch, (B,).
            lr: Step size of the descent: the student's own learning rate.

        Returns:
            The cross entropy at the end, a scalar. If its gradient is not finite the network
            stays as it is.
        """
        assert self.network is not None, "adapt it to student and teachers first"
        targets = class_numbers("mmkd", targets, ensemble.logits[0])
        network = [weight.detach().requires_grad_() for weight in self.network.parameters()]
        moving = {name: p.detach().requires_grad_() for name, p in parameters.items()}

        def match(student: Tensors) -> Tensor:
            return self._match(student, ensemble, *network).mean()

        def error(student: Tensors) -> Tensor:
            logits = student[Logits()]
            return F.cross_entropy(comparable(logits, logits)[0], targets)

        # Fused attention cannot be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for objective in (match, match, error):
                slopes = torch.autograd.grad(
                    objective(student_forward(moving)),
                    list(moving.values()),
                    create_graph=True,
                    allow_unused=True,
                )
                moving = {
                    name: parameter if slope is None else parameter - lr * slope
                    for (name, parameter), slope in zip(moving.items(), slopes)
                }
            end = error(student_forward(moving))
            gradient = parameters_to_vector(torch.autograd.grad(end, network))
        if gradient.isfinite().all():
            self._adam(gradient)
        return end.detach()

    def _match(self, student: Tensors, ensemble: Ensemble, *network: Tensor) -> Tensor:
        check_teachers("mmkd", student[Logits()], ensemble.logits, ensemble.weights)
        # A teacher without weight must not count, not even for the others' shares.
        weighted_logits = ensemble.logits.masked_fill((ensemble.weights <= 0)[..., None], 0)
        return mmkd_loss(
            student[Logits()],
            ensemble.logits,
            logit_shares(student[Logits()], weighted_logits, *network),
            weights=ensemble.weights,
            **vars(self.options),
        )

    @torch.no_grad()
    def _adam(self, gradient: Tensor) -> None:
        assert self.network is not None
        weights = parameters_to_vector(self.network.parameters())
        gradient = gradient.to(weights.dtype) + self.meta_weight_decay * weights
        mean, square = self.moments
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient**2, 0.001)
        self.steps += 1
        count = float(self.steps)
        spread = (square / (1 - 0.999**count)).sqrt_().add_(1e-8)
        weights -= self.meta_lr / (1 - 0.9**count) * mean / spread
        vector_to_parameters(weights, self.network.parameters())
