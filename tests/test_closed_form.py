"""Values that know their gradient behave as if autograd had found it."""

import pytest
import torch

from fedkd.closed_form import wanted, with_gradient


def _square(x):
    return with_gradient(x, x.detach().square().sum(dim=1), 2 * x.detach() if wanted(x) else None)


def test_one_value_per_row():
    x = torch.tensor([[1.0, 2], [3, 4]], requires_grad=True)
    (_square(x) * torch.tensor([1.0, 10])).sum().backward()
    assert x.grad.tolist() == [[2, 4], [60, 80]]


def test_a_scalar_of_any_shape():
    x = torch.ones(2, 3, 4, requires_grad=True)
    (5 * with_gradient(x, torch.tensor(7.0), torch.full((2, 3, 4), 2.0))).backward()
    assert (x.grad == 10).all()


def test_without_gradient_it_is_a_constant():
    x = torch.ones(2, 2)
    assert not _square(x).requires_grad
    with torch.no_grad():
        assert not _square(x.requires_grad_()).requires_grad


def test_it_can_be_differentiated_only_once():
    x = torch.ones(2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(_square(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_gradcheck():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_square, (x,))
