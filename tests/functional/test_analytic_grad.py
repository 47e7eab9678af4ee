"""Values that know their gradient behave as if autograd had found it."""

import pytest
import torch

from fedkd.functional.analytic_grad import first_order, needs_grad, through, with_gradient


def _solve(x, differentiate):
    return x.square().sum(dim=1), 2 * x if differentiate else None


def _formula(x):
    return x.square().sum(dim=1)


def _square(x):
    return with_gradient(x, _solve, _formula)


def test_one_value_per_row():
    x = torch.tensor([[1.0, 2], [3, 4]], requires_grad=True)
    (_square(x) * torch.tensor([1.0, 10])).sum().backward()
    assert x.grad.tolist() == [[2, 4], [60, 80]]


def test_a_scalar_of_any_shape():
    x = torch.ones(2, 3, 4, requires_grad=True)
    seven = with_gradient(x, lambda z, _: (torch.tensor(7.0), torch.full_like(z, 2.0)), torch.sum)
    (5 * seven).backward()
    assert (x.grad == 10).all()


def test_without_gradient_it_is_a_constant():
    x = torch.ones(2, 2)
    assert not _square(x).requires_grad
    with torch.no_grad():
        assert not _square(x.requires_grad_()).requires_grad


def test_the_closed_form_serves_the_first_derivative_and_the_formula_all_others():
    x = torch.tensor([[1.0, 2]], requires_grad=True)
    loud = []

    def formula(z):
        loud.append(None)
        return _formula(z)

    value = with_gradient(x, _solve, formula)
    (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    assert gradient.tolist() == [[2, 4]]
    assert not loud
    # The gradient's own gradient is not missing, also where it is one of several terms.
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    assert gradient.requires_grad
    (second,) = torch.autograd.grad(gradient.pow(3).sum() + x.sum(), x)
    assert second.tolist() == [[1 + 24, 1 + 96]]
    assert len(loud) == 1


def _tangent(x):
    """x^2 by its tangent at x: its first derivative is right, the second is 0."""

    def line(z):
        at = z.detach()
        return (at * (2 * z - at)).sum(dim=1)

    return first_order(line, _formula, x)


@pytest.mark.parametrize("function", [_square, _tangent])
def test_every_way_to_differentiate_gives_the_same(function):
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x,))
    plain = x.detach()
    assert torch.equal(torch.func.grad(lambda z: function(z).sum())(plain), 2 * plain)
    assert torch.equal(torch.func.vmap(lambda z: function(z[None])[0])(plain), _formula(plain))


def test_inputs_written_over_spoil_no_first_derivative_and_no_second_without_a_word():
    x = torch.ones(1, 2, requires_grad=True)
    for graph in (False, True):
        inputs = 1 * x
        value = _square(inputs).sum()
        inputs.mul_(3)
        if graph:
            with pytest.raises(RuntimeError, match="were written over"):
                torch.autograd.grad(value, x, create_graph=True)
        else:
            assert torch.autograd.grad(value, x)[0].tolist() == [[2, 2]]


def test_the_graph_can_be_walked_twice():
    x = torch.ones(1, 2, requires_grad=True)
    value = first_order(_formula, _formula, x)
    value.sum().backward(retain_graph=True)
    value.sum().backward()
    assert x.grad.tolist() == [[4, 4]]


def test_inputs_without_gradient_get_none():
    x = torch.ones(2, 2, requires_grad=True)
    found = through(lambda a, b: (a * b).sum(), (x, torch.ones(2, 2)), torch.tensor(1.0))
    assert found[1] is None
    assert not needs_grad(x.detach())
