"""Sinkhorn against its published values and its literal form; Gaussians against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.functional.feature_statistics import spatial_moments
from fedkd.functional.optimal_transport import bures_distance, sinkhorn_plan, transport_cost
from tests.golden.published import published

GOLDEN = published("wasserstein")
_double = GOLDEN.double
FLOWS = [case for case in GOLDEN["official"] if case["name"].startswith("sinkhorn")]


def _draw(size, classes, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, size, classes, generator=generator, dtype=torch.float64)
    costs = torch.rand(classes, classes, generator=generator, dtype=torch.float64)
    return *logits.unbind(), (costs + costs.T).fill_diagonal_(0) / 2


def _literal(source, target, costs, iterations=10, epsilon=0.05):
    """As published: one kernel per sample, unrolled; (B, C) x (B, C) x (B, C, C) -> (B,)."""
    kernel = torch.exp(-costs / epsilon)
    source, target = source[:, :, None], target[:, :, None]
    u = torch.ones_like(source) / source.shape[1]
    for _ in range(iterations):
        v = target / (kernel.transpose(1, 2) @ u + 1e-8)
        u = source / (kernel @ v + 1e-8)
    return (u * kernel * v.transpose(1, 2) * costs).sum(dim=(1, 2))


@pytest.mark.parametrize("case", FLOWS, ids=lambda case: case["name"])
def test_plan_and_cost_repeat_the_official_code(case):
    options = case["hyperparameters"]
    ours, theirs = ((_double(name) / options["T"]).softmax(1) for name in ("logits_s", "logits_t"))
    costs = _double("wkd_cost") + 1e-8
    steps = {"epsilon": options["reg"], "iterations": options["iters"]}
    plan = sinkhorn_plan(ours, theirs, costs, **steps)
    expected = torch.tensor(case["outputs"]["flow_sample0"], dtype=torch.float64)
    torch.testing.assert_close(plan[0], expected, rtol=1e-9, atol=1e-13)
    for key, axis, marginal in [("row", 2, ours), ("col", 1, theirs)]:
        error = (plan.sum(dim=axis) - marginal).abs().sum(dim=1)
        assert error.tolist() == pytest.approx(case["outputs"][f"{key}_marginal_l1_err"], rel=1e-6)
    cost = transport_cost(ours, theirs, costs, **steps)
    assert cost.tolist() == pytest.approx(case["value"], rel=1e-9)
    torch.testing.assert_close(cost, (plan * costs).sum(dim=(1, 2)))


@pytest.mark.parametrize("iterations", [1, 2, 10])
@pytest.mark.parametrize("without", [None, [4, 0, 2]])
def test_one_kernel_for_all_equals_one_for_each(iterations, without):
    student, teacher, costs = _draw(3, 5)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    if without is None:
        left, kept = None, costs.expand(3, 5, 5)
        whole, rest = ([z.softmax(1) for z in (student, teacher)] for _ in range(2))
    else:
        left = torch.tensor(without)
        keep = torch.ones(3, 5).scatter(1, left[:, None], 0).bool()
        whole = [z.masked_fill(~keep, -torch.inf).softmax(1) for z in (student, teacher)]
        rest = [z[keep].view(3, 4).softmax(1) for z in (student, teacher)]
        kept = costs.expand(3, 5, 5)[keep[:, :, None] & keep[:, None]].view(3, 4, 4)
    weights = torch.tensor([1.0, -2.0, 3.0])
    literal = _literal(*rest, kept, iterations)
    cost = transport_cost(*whole, costs, iterations=iterations, without=left)
    torch.testing.assert_close(cost, literal, rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad((literal * weights).sum(), (student, teacher))
    found = torch.autograd.grad((cost * weights).sum(), (student, teacher))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("debiased", [False, True])
def test_transport_gradcheck(debiased):
    student, teacher, costs = _draw(2, 4)
    assert torch.autograd.gradcheck(
        lambda a, b: transport_cost(
            a.softmax(1), b.softmax(1), costs, iterations=3, debiased=debiased
        ),
        (student.requires_grad_(), teacher.requires_grad_()),
    )


def test_between_two_classes_it_is_total_variation():
    ours, theirs = torch.tensor([[0.9, 0.1]]).double(), torch.tensor([[0.3, 0.7]]).double()
    costs = torch.tensor([[0.0, 0.5], [0.5, 0.0]]).double()
    cost = transport_cost(ours, theirs, costs, epsilon=0.02, iterations=500, floor=0.0)
    assert cost.item() == pytest.approx(0.5 * 0.6, rel=1e-6)


def test_all_mass_on_one_class_each_costs_that_move():
    costs = torch.tensor([[0.0, 0.2, 0.7], [0.2, 0.0, 0.4], [0.7, 0.4, 0.0]])
    ours = torch.tensor([[1.0, 0, 0], [0, 1, 0]], requires_grad=True)
    cost = transport_cost(ours, torch.tensor([[0.0, 0, 1], [0, 1, 0]]), costs)
    cost.sum().backward()
    assert cost.tolist() == pytest.approx([0.7, 0.0], abs=0.02)
    assert ours.grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(0, 10**6), st.randoms())
def test_rows_sum_to_the_source_and_order_does_not_matter(size, classes, seed, random):
    student, teacher, costs = _draw(size, classes, seed, scale=3.0)
    ours, theirs = student.softmax(1), teacher.softmax(1)
    rows, columns = list(range(size)), list(range(classes))
    random.shuffle(rows)
    random.shuffle(columns)
    plan = sinkhorn_plan(ours, theirs, costs, floor=0.0)
    torch.testing.assert_close(plan.sum(dim=2), ours)
    moved = transport_cost(
        ours[rows][:, columns], theirs[rows][:, columns], costs[columns][:, columns]
    )
    torch.testing.assert_close(moved, transport_cost(ours, theirs, costs)[rows])


def test_debiased_transport_to_itself_is_free():
    student, teacher, costs = _draw(3, 5)
    ours = student.softmax(1)
    assert transport_cost(ours, ours, costs, debiased=True).abs().max() < 1e-15
    assert (transport_cost(ours, ours, costs) > 0).all()
    cost = transport_cost(ours, teacher.softmax(1), costs)
    selves = [transport_cost(p, p, costs) for p in (ours, teacher.softmax(1))]
    debiased = transport_cost(ours, teacher.softmax(1), costs, debiased=True)
    torch.testing.assert_close(debiased, cost - (selves[0] + selves[1]) / 2)


def test_no_iterations_are_refused():
    student, teacher, costs = _draw(1, 2)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        transport_cost(student.softmax(1), teacher.softmax(1), costs, iterations=0)


def _gaussians(maps):
    points = maps.flatten(2)
    return (points - points.mean(dim=2, keepdim=True)) / points.shape[2] ** 0.5


def test_bures_repeats_the_reference():
    (case,) = (c for c in GOLDEN["not_official"] if c["name"].startswith("gaussian"))
    ours, theirs = _double("map_s_8x8"), _double("map_t_8x8")
    expected = [row[1] for row in case["per_sample_mean_and_cov_terms"]]
    found = bures_distance(_gaussians(ours), spatial_moments(theirs)[:, 1:])
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_covariances_that_commute_compare_roots_of_variances():
    points = torch.diag(torch.tensor([3.0, 1.0, 0.0])).double()[None]
    covariance = torch.diag(torch.tensor([4.0, 16.0, 25.0])).double()[None]
    assert bures_distance(points, covariance).item() == pytest.approx(1 + 9 + 25)


@pytest.mark.parametrize("places", [2, 3, 7])
def test_bures_from_either_side(places):
    generator = torch.Generator().manual_seed(places)
    points = torch.randn(2, 4, places, generator=generator, dtype=torch.float64)
    other = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(points @ points.transpose(1, 2))
    half = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.transpose(1, 2)
    covariance = other @ other.transpose(1, 2)
    roots = torch.linalg.eigvalsh(half @ covariance @ half).clamp(min=0).sqrt().sum(dim=1)
    expected = (points**2).sum(dim=(1, 2)) + (other**2).sum(dim=(1, 2)) - 2 * roots
    torch.testing.assert_close(bures_distance(points, covariance), expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: bures_distance(x, covariance), (points.requires_grad_(),)
    )


@pytest.mark.parametrize("shape", [(5, 2, 2), (3, 4, 4)])
def test_equal_covariances_lie_together_whatever_their_rank(shape):
    maps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[1] = maps[1, :1]  # all channels alike
    points = _gaussians(maps).requires_grad_()
    distance = bures_distance(points, spatial_moments(maps)[:, 1:])
    (gradient,) = torch.autograd.grad(distance.sum(), points)
    assert distance.abs().max() < 1e-7
    assert gradient.abs().max() < 1e-6


def test_a_constant_map_has_no_covariance():
    points = torch.zeros(1, 3, 4, requires_grad=True)
    distance = bures_distance(points, torch.eye(3)[None])
    distance.sum().backward()
    assert distance.item() == 3
    assert (points.grad == 0).all()
