"""The two graphs of VRM as losses of their own."""

from typing import Any

from torch import Tensor

from fedkd.functional.relations import both_views, class_graph, match, reliable, sample_graph


def sample_relation_loss(
    student_real: Tensor,
    student_virtual: Tensor | None,
    teacher_real: Tensor,
    teacher_virtual: Tensor | None,
    *,
    edges: Any = "real_virtual",
    pruning: Any = None,
    rho: float = 0.1,
    **options: Any,
) -> Tensor:
    """Mean distance between the edges of two sample graphs, four times (B, C) -> scalar."""
    student = both_views(student_real, student_virtual, edges)
    teacher = both_views(teacher_real, teacher_virtual, edges)
    keep = None
    if pruning is not None:
        judged = student_real, student_virtual
        keep = reliable(student, teacher, judged, rule=pruning, rho=rho, edges=edges)
    return match(student, teacher, sample_graph(edges=edges, keep=keep, **options))


def class_relation_loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """Mean distance between the edges of two class graphs, (N, C) x (N, C) -> scalar."""
    return match(student, teacher, class_graph(**options))
