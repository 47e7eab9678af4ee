"""No loss fetches a number from an accelerator: that would stop it in every step.

On the device `meta`, where tensors have no values, a look at one is an error. What is computed in
another way there than on a CPU is held against the CPU's.
"""

import pytest
import torch
from torch import Tensor

from fedkd.functional.similarity import _gaussian, _median
from fedkd.losses import LOSSES
from fedkd.losses.aekd import _on_device, agreement_weights
from fedkd.losses.dgkd import dgkd_loss
from fedkd.losses.min_norm import shortest, shortest_there
from tests.losses.contract import VARIANTS, adapted, batch, call, draw, title


def _from_the_host(*_: object, **__: object) -> Tensor:
    raise AssertionError("numbers are copied from the host")


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_no_loss_waits_for_its_device(
    variant: tuple[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = variant
    loss = LOSSES.create(name, **options)
    student, teacher, targets, weights = batch(loss)
    ready = adapted(loss, student, teacher).to("meta")
    there = {kind: tensor.to("meta").requires_grad_() for kind, tensor in student.items()}
    theirs = {kind: tensor.to("meta") for kind, tensor in teacher.items()}
    for place, making in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        monkeypatch.setattr(place, making, _from_the_host)
    value = call(ready, there, theirs, targets.to("meta"), weights.to("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        value.sum().item()
    value.mean().backward()


@pytest.mark.parametrize("options", [{"drop": 1}, {"survival": 0.75}])
def test_chance_drops_teachers_where_they_lie(options: dict[str, object]) -> None:
    loss = LOSSES.create("dgkd", **options).train()
    with torch.device("meta"):
        kept = loss._draw(4, torch.device("meta"))
    assert kept is not None
    assert (kept.dtype, kept.shape) == (torch.bool, (4,))
    student, teachers = draw(5, 3), torch.stack([draw(5, 3, seed=n) for n in (1, 2, 3)])
    for rows in ([0, 2], []):
        mask = torch.tensor([n in rows for n in range(3)])
        by_number = dgkd_loss(student, teachers, kept=torch.tensor(rows, dtype=torch.long))
        torch.testing.assert_close(dgkd_loss(student, teachers, kept=mask), by_number)


@pytest.mark.parametrize("nu", [None, 1.0, 0.5])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_solver_of_a_device_finds_the_same_weights(count: int, nu: float | None) -> None:
    vectors = draw(count, 60)
    gram = vectors @ vectors.T
    share = 1 / count if nu is None else min(max(nu, 1 / count), 1.0)
    wanted = torch.from_numpy(shortest(gram.numpy(), 1 / (share * count)))
    everybody = torch.ones(count, dtype=torch.bool)
    torch.testing.assert_close(shortest_there(gram, everybody, nu), wanted, atol=1e-6, rtol=0)
    # An absent vector might as well be missing.
    wider = torch.block_diag(gram, torch.ones(1, 1, dtype=torch.double))
    some = shortest_there(wider, torch.tensor([True] * count + [False]), nu)
    torch.testing.assert_close(some[:count], wanted, atol=1e-6, rtol=0)
    assert some[count] == 0
    nothing = shortest_there(torch.zeros_like(gram), everybody, nu)
    torch.testing.assert_close(nothing, torch.full_like(nothing, 1 / count))


@pytest.mark.parametrize("normalise", [False, True])
def test_agreement_is_the_same_on_a_device(normalise: bool) -> None:
    student, teachers = draw(6, 4), torch.stack([draw(6, 4, seed=n) for n in (1, 2, 3, 4)])
    weights = torch.rand(4, 6, dtype=torch.double)
    weights[2] = 0
    wanted = agreement_weights(student, teachers, weights=weights, normalise=normalise)
    found = _on_device(student, teachers, weights, 4.0, None, normalise)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_a_median_needs_no_count() -> None:
    distances = draw(7, 7).square()
    for count in (1, 2, 3, 7):
        some = torch.arange(7) < count
        wanted = distances[some][:, some].median()
        torch.testing.assert_close(_median(distances, some), wanted)
    nobody = torch.zeros(7)
    assert _median(distances, nobody > 0).isinf()
    assert _gaussian(draw(7, 3), nobody.double(), 1.0).isfinite().all()


def _values(name: str, options: dict[str, object], *, wide: bool) -> tuple[Tensor, ...]:
    loss = LOSSES.create(name, **options)
    student, teacher, targets, weights = batch(loss)
    dtype = torch.double if wide else torch.float
    there = {kind: tensor.to(dtype).requires_grad_() for kind, tensor in student.items()}
    theirs = {kind: t.to(dtype) if t.is_floating_point() else t for kind, t in teacher.items()}
    value = call(adapted(loss, student, teacher), there, theirs, targets, weights)
    value.mean().backward()
    return value.detach().double(), *(t.grad.double() for t in there.values() if t.grad is not None)


@pytest.mark.parametrize(("name", "options"), [("dist", {}), ("rkd", {}), ("rkd", {"squared": 1})])
def test_double_precision_gives_what_float32_gives(name: str, options: dict[str, object]) -> None:
    """A CPU takes float32 where that does; an accelerator, which is not asked, does not."""
    options = {key: bool(value) for key, value in options.items()}
    narrow, wide = (_values(name, options, wide=wide) for wide in (False, True))
    for ours, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
