"""Which edges a sample graph has, and which of them are not to be relied on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedkd.functional.precision import full, full_precision
from fedkd.functional.relations.matching import Edges

Pruning = Literal[
    "joint_entropy_indep", "joint_entropy_diag", "edge_discrepancy", "view_discrepancy"
]


@full_precision
def edge_scores(
    student_real: Tensor,
    student_virtual: Tensor | None,
    rule: Pruning,
    edges: Edges = "real_virtual",
) -> Tensor:
    """Unreliability of each edge from the student's predictions, (B, C) x (B, C) -> (B, B).

    With "full" edges the result is (2B, 2B). Rules, for P and Q the probabilities at the ends:

    - `joint_entropy_indep`: H(P) + H(Q).
    - `joint_entropy_diag`: entropy of the two ends saying the same class,
      -sum_c P_c Q_c log(P_c Q_c).
    - `view_discrepancy`: symmetric KL between the two views of a sample, summed over both ends.

    The fourth rule, `edge_discrepancy`, is 1 - cos of the edge itself and needs the teacher.
    """
    if edges != "real" and student_virtual is None:
        raise ValueError(f"edges {edges!r} need a virtual view")
    real = torch.log_softmax(full(student_real.detach()), dim=-1)
    virtual = student_virtual
    if virtual is not None:
        virtual = torch.log_softmax(full(virtual.detach()), dim=-1)
    if rule == "view_discrepancy":
        if virtual is None:
            raise ValueError("pruning 'view_discrepancy' compares two views, got one")
        gap = ((real.exp() - virtual.exp()) * (real - virtual)).sum(dim=-1)
        gap = torch.cat([gap, gap]) if edges == "full" else gap
        return gap[:, None] + gap
    log_p, log_q = _ends(real, virtual, edges)
    p, q = log_p.exp(), log_q.exp()
    if rule == "joint_entropy_indep":
        return -(p * log_p).sum(dim=-1)[:, None] - (q * log_q).sum(dim=-1)
    if rule == "joint_entropy_diag":
        return -((p * log_p) @ q.T + p @ (q * log_q).T)
    raise ValueError(f"pruning {rule!r} is not judged by the student's predictions alone")


def smallest(scores: Tensor, rho: float, *, own: bool) -> Tensor:
    """Mask without the `rho` largest scores (and, in a graph on `own` vertices, its diagonal)."""
    total = scores.numel()
    if own:
        scores = (scores + scores.T) / 2  # one fate for both directions, whatever the rounding
        scores.fill_diagonal_(-torch.inf)
        total -= len(scores)
    ranked = scores.flatten().kthvalue(max(1, scores.numel() - int(rho * total))).values
    keep = scores <= ranked
    return keep.fill_diagonal_(False) if own else keep


def _ends(real: Tensor, virtual: Tensor | None, edges: Edges) -> tuple[Tensor, Tensor]:
    """Vertices at which edges start and end."""
    if edges == "real" or virtual is None:
        return real, real
    if edges == "real_virtual":
        return real, virtual
    both = torch.cat([real, virtual])
    return both, both
