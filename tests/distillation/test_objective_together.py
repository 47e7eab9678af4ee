"""Teachers in one go: the same digits as one after the other."""

import pytest
import torch
from torch import Tensor

from fedkd.distillation.objective import Objective, Term
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES

Losses = tuple[tuple[str, dict[str, object]], ...]


def _ensemble(size: int, classes: int, teachers: int) -> tuple[dict[Kind, Tensor], Ensemble]:
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, kinds = draw(size, classes), (Logits(), VirtualLogits(0))
    weights = torch.rand(teachers, size, generator=generator)
    weights[0, 1] = 0
    return {kind: base + draw(size, classes) for kind in kinds}, Ensemble(
        tuple(map(Teacher, range(teachers))),
        {kind: base + 2 * draw(teachers, size, classes) for kind in kinds},
        weights / weights.sum(0),
        torch.rand(teachers, classes, generator=generator) if size % 3 else None,
    )


@pytest.mark.parametrize("size", [32, 16, 13])
@pytest.mark.parametrize(
    "losses",
    [
        (("dkd", {}), ("vrm", {})),
        (("vrm", {"edges": "full"}), ("kd", {"standardise": True}), ("ce", {})),
        (("kd", {}), ("vrm", {"edges": "real", "distance": "squared"})),
    ],
    ids=lambda losses: "-".join(name for name, _ in losses),
)
def test_together_is_one_by_one(losses: Losses, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, ensemble = _ensemble(size, 10, 5)
    targets = torch.arange(size) % 10
    results, used = [], []
    for together in (True, False):
        objective = Objective([Term(name, LOSSES.create(name, **more)) for name, more in losses])
        for loss in objective.losses:
            if not together:
                monkeypatch.setattr(loss, "together", lambda *_: None)
            elif loss.needs:
                used.append(loss.together(student, ensemble, targets) is not None)
        leaves = {kind: tensor.clone().requires_grad_() for kind, tensor in student.items()}
        value = objective(leaves, ensemble, targets, 1, 1)
        value.total.backward()
        slopes = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
        results.append([value.total.detach(), *slopes])
    assert all(used) == any(used) == (size != 13)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_teacher_that_is_not_finite_is_named_all_the_same() -> None:
    student, ensemble = _ensemble(32, 10, 3)
    ensemble.logits[1, 4, 2] = torch.nan
    objective = Objective([Term("kd", LOSSES.create("kd"))])
    with pytest.raises(ValueError, match=r"teacher_logits .* holds NaN"):
        objective(student, ensemble, None, 1, 1)
