"""Whatever is differentiated, however often and in whatever way, it is the same derivative."""

import pytest
import torch

from fedkd.functional.feature_statistics import (
    cell_statistics,
    class_maps,
    spatial_moments,
    spectral_norms,
)
from fedkd.functional.optimal_transport import transport_cost
from fedkd.functional.similarity import linear_cka, rbf_cka, unbiased_cka
from fedkd.losses import LOSSES
from fedkd.losses.aekd import agreement_weights
from fedkd.losses.divergence import weighted_kl
from fedkd.losses.kd import standardised
from tests.functional.relation_losses import class_relation_loss, sample_relation_loss
from tests.losses.contract import VARIANTS, adapted, batch, call, draw, title


def _functions(variant):
    """The loss as a function of what it reads from the student, in double precision."""
    name, options = variant
    loss = LOSSES.create(name, **options)
    student, teacher, targets, weights = batch(loss, 4, 3)
    loss = adapted(loss, student, teacher).double().eval()
    teacher = {kind: tensor.double() for kind, tensor in teacher.items()}
    kinds = list(student)

    def function(*tensors):
        read = dict(zip(kinds, tensors))
        return call(loss, read, teacher, targets, weights.double())

    return function, [student[kind].double().requires_grad_() for kind in kinds]


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_all_derivatives(variant):
    function, inputs = _functions(variant)
    known = torch.autograd.grad(function(*inputs).sum(), inputs)
    # With a second derivative in sight the plain formula answers: with the same gradient.
    again = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    for one, other in zip(known, again):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    few = sum(tensor.numel() for tensor in inputs) < 200
    atol = 1e-6 if few else 1e-4
    assert torch.autograd.gradcheck(function, inputs, fast_mode=not few, atol=atol)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-3, rtol=1e-2)

    plain = [tensor.detach() for tensor in inputs]
    tangents = [torch.randn_like(tensor) for tensor in plain]
    slope = sum((gradient * t).sum() for gradient, t in zip(known, tangents))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(plain, tangents)]
        value, moved = torch.autograd.forward_ad.unpack_dual(function(*duals).sum())
    torch.testing.assert_close(moved, slope, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(value, function(*plain).sum())
    if variant[0] == "aekd":  # refuses, below
        return
    both = tuple(range(len(plain)))
    found = torch.func.grad(lambda *z: function(*z).sum(), argnums=both)(*plain)
    for one, other in zip(known, found):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def _drawn(*shape, seed=0):
    return draw(*shape, seed=seed).requires_grad_()


COSTS = _drawn(4, 4).detach().abs()
BEHIND = {
    "exact norms": (
        lambda a, b: spectral_norms([a, b], iterations=60),
        [_drawn(2, 3, 4, 4), _drawn(2, 4, 2, 2)],
    ),
    "cells": (lambda a: cell_statistics(a, 3), [_drawn(2, 2, 4, 4)]),
    "moments": (spatial_moments, [_drawn(2, 2, 3, 3)]),
    "class maps": (lambda a: class_maps(a, COSTS, 2), [_drawn(2, 4, 4, 4)]),
    "transport": (
        lambda a, b: transport_cost(a.softmax(1), b.softmax(1), COSTS, iterations=3),
        [_drawn(2, 4), _drawn(2, 4, seed=1)],
    ),
    "linear": (lambda a, b: linear_cka(a, b), [_drawn(5, 3), _drawn(5, 2, seed=1)]),
    "rbf": (lambda a, b: rbf_cka(a, b), [_drawn(5, 3), _drawn(5, 2, seed=1)]),
    "unbiased": (lambda a, b: unbiased_cka(a, b), [_drawn(5, 3), _drawn(5, 2, seed=1)]),
    "samples": (
        lambda a, b: sample_relation_loss(a, b, draw(4, 3, seed=2), draw(4, 3, seed=3)),
        [_drawn(4, 3), _drawn(4, 3, seed=1)],
    ),
    "classes": (lambda a: class_relation_loss(a, draw(4, 3, seed=2)), [_drawn(4, 3)]),
    "z-scores": (standardised, [_drawn(3, 4)]),
}


@pytest.mark.parametrize("name", BEHIND)
def test_all_derivatives_of_what_is_behind_the_losses(name):
    function, inputs = BEHIND[name]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    plain = [tensor.detach() for tensor in inputs]
    known = torch.autograd.grad(function(*inputs).sum(), inputs)
    found = torch.func.grad(lambda *z: function(*z).sum(), tuple(range(len(plain))))(*plain)
    for one, other in zip(known, found):
        torch.testing.assert_close(one, other)


def test_samples_one_by_one_under_vmap():
    student, teacher = _drawn(4, 3).detach(), _drawn(2, 4, 3, seed=1).detach()

    def alone(z, t):
        return weighted_kl(z[None], t[:, None]).squeeze(0)

    found = torch.func.vmap(torch.func.grad(alone), in_dims=(0, 1))(student, teacher)
    student.requires_grad_()
    expected = torch.autograd.grad(weighted_kl(student, teacher).sum(), student)[0]
    torch.testing.assert_close(found, expected)


def test_a_gradient_penalty_is_not_lost_among_other_terms():
    """Where a constant gradient would give no error, since something else has one."""
    loss = LOSSES.create("kd")
    student, teacher, targets, weights = batch(loss, 4, 3)
    (kind,) = loss.reads
    logits = student[kind].requires_grad_()
    value = call(loss, student, teacher, targets, weights).sum()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    alone = torch.autograd.grad(value, logits, retain_graph=True)[0]
    (total,) = torch.autograd.grad(value + 1e6 * gradient.square().sum(), logits)
    assert not torch.allclose(total, alone)


def test_weights_that_are_solved_for_refuse_a_transform():
    teachers = _drawn(2, 4, 3).detach()
    with pytest.raises(RuntimeError, match=r"torch.func does not reach .* `agreement_weights`"):
        torch.func.grad(lambda z: agreement_weights(z, teachers).sum())(teachers[0])
