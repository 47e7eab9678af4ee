"""Decoupled knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.functional.analytic_grad import with_gradient
from fedkd.functional.options import Positive
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble
from fedkd.losses import LOSSES
from fedkd.losses.base import FormulaLoss, Tensors
from fedkd.losses.inputs import check_batch, class_numbers, loss_function
from fedkd.losses.kd import comparable, divergence, floored, paired, rows_together, standardised


@loss_function("dkd")
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: Positive = 4.0,
    standardise: bool = False,
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD) per sample, (B, C) x (B, C) x (B,) -> (B,).

    TCKD compares target against rest, NCKD the distributions over the rest; with two classes
    NCKD is exactly zero. Half precision is computed in float32; the teacher is detached.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        targets: Class indices, (B,).
        alpha: Weight of the target-class part.
        beta: Weight of the non-target part. The paper's runs on CIFAR-100 use 2 to 8, more where
            the teacher is surer, and let the loss rise over 20 epochs; with ten classes and a
            dozen epochs 8 is worse than no teacher, 1 (as heavy as `kd`) and 2 are better.
        temperature: Softness of both distributions.
        standardise: Compare z-scores of the logits (Sun et al.).
    """
    check_batch("dkd", student_logits, teacher_logits, classes=student_logits.shape[-1])
    targets = class_numbers("dkd", targets, student_logits)
    student, teacher = comparable(student_logits, teacher_logits)

    def solve(logits: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        both, grad_to_logits = paired(logits, teacher, standardise, temperature)
        value, gradient = _solve(both.flatten(0, 1), targets, alpha, beta, temperature)
        return value, grad_to_logits(gradient) if differentiate else None

    def formula(logits: Tensor) -> Tensor:
        z, t = (standardised(z) if standardise else z for z in (logits, teacher))
        (odds, rest), (their_odds, their_rest) = (_parts(z / temperature, targets) for z in (z, t))
        tckd = divergence(_sure(odds), _sure(their_odds))
        return temperature**2 * (alpha * tckd + beta * divergence(rest, their_rest))

    return with_gradient(student, solve, formula)


@LOSSES.register("dkd")
class DKDLoss(FormulaLoss, formula=dkd_loss):
    """Matches the target class and the other classes separately. Needs labels.

    References:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022,
            https://arxiv.org/abs/2203.08679
        Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
            https://arxiv.org/abs/2403.01427
    """

    needs = (Logits(),)
    needs_targets = True

    def together(
        self, student: Tensors, ensemble: Ensemble, targets: Tensor | None
    ) -> list[Tensor] | None:
        """Losses (B,) of each teacher."""
        if targets is None:
            return None
        options, logits = self.options, student[Logits()]
        classes = class_numbers("dkd", targets, logits).repeat(len(ensemble))
        alpha, beta, temperature = options.alpha, options.beta, options.temperature
        return rows_together(
            logits,
            ensemble,
            lambda both: _solve(both, classes, alpha, beta, temperature),
            options.standardise,
            temperature,
        )


def _parts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds of the target, (B,), and log-probabilities of the others among them, (B, C)."""
    target = targets[:, None]
    others = logits.scatter(1, target, torch.finfo(logits.dtype).min / 4)
    odds = logits.gather(1, target).squeeze(1) - others.logsumexp(dim=1)
    return odds, F.log_softmax(others, dim=1)


def _sure(odds: Tensor) -> Tensor:
    """Log-probabilities of the target and of all others together, (B,) -> (B, 2)."""
    return F.logsigmoid(torch.stack([odds, -odds], dim=1))


def _solve(
    logits: Tensor, targets: Tensor, alpha: float, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Value (B,) and gradient (B, C) for softened logits, the teacher's below the student's.

    Consumes the logits. It is, written out, for the target y,

        odds = logits[y] - logsumexp(logits without y)          # of student s and teacher t
        tckd = KL(Bernoulli(sigmoid(odds_t)) || Bernoulli(sigmoid(odds_s)))
        nckd = KL(softmax(t without y) || softmax(s without y))
        value = T**2 * (alpha * tckd + beta * nckd)
        gradient = T * beta * (r - q) - surplus * r             # of the classes without y
        gradient[y] = surplus = T * alpha * (sigmoid(odds_s) - sigmoid(odds_t))

    with r and q the student's and the teacher's probabilities without y.

    The official code hides the target behind -1000 and takes the log of summed probabilities,
    which is inf or NaN for sure predictions. Log-odds from a log-sum-exp over the other classes
    give the same number and hold for any finite logits.
    """
    size = len(targets)
    target = torch.cat([targets, targets])[:, None]
    odds = logits.gather(1, target)
    # Far below all others, yet finite: its share of the rest is 0, and 0 times it no NaN.
    logits.scatter_(1, target, torch.finfo(logits.dtype).min / 4)
    log_rest = floored(F.log_softmax(logits, dim=1))
    # Less the log-sum-exp of the others; at their top nothing cancels.
    odds.add_(log_rest.amax(dim=1, keepdim=True)).sub_(logits.amax(dim=1, keepdim=True))
    r, q = F.softmax(logits, dim=1).split(size)  # on a CPU faster than exp
    log_r, log_q = log_rest.split(size)
    nckd = log_q.sub_(log_r).mul_(q).sum(dim=1)
    odds = torch.cat([odds, -odds], dim=1)  # of the target, and of the rest
    log_s, log_t = floored(F.logsigmoid(odds)).split(size)
    share_s, share_t = odds.sigmoid_().split(size)
    tckd = log_t.sub_(log_s).mul_(share_t).sum(dim=1)
    square = temperature**2
    # The power of two changes no digit, but makes a floor infinite on the way.
    value = tckd.mul_(alpha * square * 2.0**64).add_(nckd, alpha=beta * square * 2.0**64)
    value.mul_(2.0**-64)
    surplus = share_s.sub_(share_t).mul_(alpha * temperature)[:, :1]
    gradient = r.mul_(beta * temperature - surplus).sub_(q, alpha=beta * temperature)
    return value, gradient.scatter_(1, target[:size], surplus)
