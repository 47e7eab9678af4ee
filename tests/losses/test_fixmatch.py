"""FixMatch: who teaches, who learns, and who is passed over."""

import math

import torch

from fedkd.losses.fixmatch import fixmatch_loss
from tests.losses.contract import draw


def test_only_the_sure_teach_and_only_the_other_view_learns() -> None:
    weak = torch.tensor([[0.96, 0.04], [0.94, 0.06], [0.01, 0.99]]).log().requires_grad_()
    strong = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]).log().requires_grad_()
    value = fixmatch_loss(weak, strong)
    expected = torch.tensor([math.log(2), 0.0, -math.log(0.8)])
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert weak.grad is not None
    assert (weak.grad == 0).all()
    assert strong.grad is not None
    torch.testing.assert_close(strong.grad[0], torch.tensor([-0.5, 0.5]))
    assert (strong.grad[1] == 0).all()


def test_with_no_gate_all_teach() -> None:
    weak, strong = draw(5, 3), draw(5, 3, seed=1)
    expected = torch.nn.functional.cross_entropy(strong, weak.argmax(dim=1), reduction="none")
    torch.testing.assert_close(fixmatch_loss(weak, strong, confidence=0.0), expected)


def test_a_nan_is_not_passed_over() -> None:
    weak = torch.tensor([[math.nan, 0.0], [9.0, 0.0]])
    assert fixmatch_loss(weak, torch.zeros(2, 2)).isnan().tolist() == [True, False]
