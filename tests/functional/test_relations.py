"""Relation graphs against the same graphs written out edge by edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkd.functional.relations import edge_scores, gram, match, matching, reliable, sample_graph
from fedkd.losses.kd import standardised
from tests.functional.relation_losses import class_relation_loss, sample_relation_loss
from tests.losses.contract import rand

RULES = ["joint_entropy_indep", "joint_entropy_diag", "edge_discrepancy", "view_discrepancy"]


@pytest.fixture(params=["as_on_cpu", "as_on_gpu"])
def precision(request, monkeypatch):
    """Gram matrices in the dtype of the logits, whatever they hold."""

    def single(vertices, sources, view_pairs):
        found = gram.Cosines(vertices, sources, gram._NOISE)
        if view_pairs:
            found.refine_view_pairs()
        return found

    if request.param == "as_on_gpu":
        monkeypatch.setattr(matching, "cosines", single)


# The oracle: the published formulas, every edge written out.


def _unit(left: Tensor, right: Tensor) -> Tensor:
    difference = left[:, None] - right
    length = difference.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, difference / length.clamp(min=1e-12), 0)


def _edge_distances(left, right, teacher_left, teacher_right, distance="cosine", delta=1.0):
    gap = _unit(left, right) - _unit(teacher_left, teacher_right)
    if distance in ("cosine", "squared"):
        return gap.square().sum(dim=-1) * (1 if distance == "squared" else 0.5)
    if distance == "edge_huber":
        gap = gap.square().sum(dim=-1, keepdim=True).sqrt()
    if distance == "masked":
        return (gap * (gap.abs() <= delta)).square().sum(dim=-1) / 2
    return torch.nn.functional.huber_loss(
        gap, torch.zeros_like(gap), reduction="none", delta=delta
    ).sum(dim=-1)


def _literal_samples(a, b, d, e, *, edges="real_virtual", weights=None, keep=None, **options):
    weights = torch.ones(len(a), dtype=a.dtype) if weights is None else weights
    if edges == "real":
        a, b, d, e = a, a, d, d
    elif edges == "full":
        a, d, weights = torch.cat([a, b]), torch.cat([d, e]), torch.cat([weights, weights])
        b, e = a, d
    counted = torch.ones(len(a), len(b), dtype=torch.bool) if keep is None else keep.clone()
    if edges != "real_virtual":
        counted.fill_diagonal_(False)
    each = _edge_distances(a, b, d, e, **options) * torch.outer(weights, weights).sqrt()
    return each[counted].sum() / counted.sum()


def _literal_classes(student, teacher, *, weights=None, class_weights=None, **options):
    weights = torch.ones(len(student), dtype=student.dtype) if weights is None else weights
    if class_weights is None:
        class_weights = torch.ones(student.shape[1], dtype=student.dtype)
    columns, teacher_columns = ((z * weights.sqrt()[:, None]).T for z in (student, teacher))
    each = _edge_distances(columns, columns, teacher_columns, teacher_columns, **options)
    each = each * torch.outer(class_weights, class_weights).sqrt()
    return weights.mean() * each[~torch.eye(len(columns), dtype=torch.bool)].mean()


def _draw(size=5, classes=7, seed=0, perturbation=0.7, dtype=torch.float64):
    """Real and virtual logits of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, size, classes, generator=generator, dtype=torch.float64)
    views = z[0], z[0] + perturbation * z[1], z[2], z[2] + perturbation * z[3]
    return tuple(view.to(dtype) for view in views)


def _gradients(value, *tensors):
    return torch.autograd.grad(value, tensors, allow_unused=True)


def _same(ours, literal, *tensors, rtol=1e-9):
    torch.testing.assert_close(ours, literal, rtol=rtol, atol=1e-12)
    for got, expected in zip(_gradients(ours, *tensors), _gradients(literal, *tensors)):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=rtol * 10, atol=1e-12)


# Against the oracle.

DISTANCES = [
    ("cosine", 1.0),
    ("squared", 1.0),
    ("huber", 1.0),
    ("huber", 0.05),
    ("edge_huber", 10.0),
    ("edge_huber", 0.5),
    ("masked", 0.1),
]


@pytest.mark.parametrize("edges", ["real_virtual", "full", "real"])
@pytest.mark.parametrize(("distance", "delta"), DISTANCES)
@pytest.mark.parametrize("weighted", [False, True])
def test_sample_graph_equals_the_literal_one(edges, distance, delta, weighted, monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK", 2 * 5 * 7)  # Huber in several row blocks
    a, b, d, e = _draw()
    a.requires_grad_(), b.requires_grad_()
    weights = rand(5) if weighted else None
    options = {"edges": edges, "distance": distance, "delta": delta}
    ours = sample_relation_loss(a, b, d, e, sample_weights=weights, **options)
    _same(ours, _literal_samples(a, b, d, e, weights=weights, **options), a, b)
    shorter = sample_relation_loss(
        a, b, d, e, sample_weights=weights, reduction="elements", **options
    )
    torch.testing.assert_close(7 * shorter, ours)


@pytest.mark.parametrize(("distance", "delta"), DISTANCES)
@pytest.mark.parametrize("weights", [None, rand(10)])
@pytest.mark.parametrize("class_weights", [None, rand(7, seed=2)])
def test_class_graph_equals_the_literal_one(distance, delta, weights, class_weights, monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK", 3 * 7 * 10)
    a, b, d, e = _draw()
    student, teacher = torch.cat([a, b]).requires_grad_(), torch.cat([d, e])
    options = {"class_weights": class_weights, "distance": distance, "delta": delta}
    ours = class_relation_loss(student, teacher, sample_weights=weights, **options)
    _same(ours, _literal_classes(student, teacher, weights=weights, **options), student)
    options |= {"sample_weights": weights, "reduction": "elements"}
    shorter = class_relation_loss(student, teacher, **options)
    torch.testing.assert_close(10 * shorter, ours)


@pytest.mark.parametrize("edges", ["real_virtual", "full", "real"])
@pytest.mark.parametrize("rule", RULES)
def test_pruned_graph_equals_the_literal_one(edges, rule):
    a, b, d, e = _draw(size=6)
    a.requires_grad_(), b.requires_grad_()
    weights = rand(6)
    ours = sample_relation_loss(
        a, b, d, e, edges=edges, pruning=rule, rho=0.3, sample_weights=weights
    )
    if rule == "edge_discrepancy":
        ends = {
            "real": (a, a, d, d),
            "real_virtual": (a, b, d, e),
            "full": (torch.cat([a, b]),) * 2 + (torch.cat([d, e]),) * 2,
        }[edges]
        scores = _edge_distances(*ends).detach()
    else:
        scores = _literal_scores(a.detach(), b.detach(), rule, edges)
    off = torch.ones_like(scores, dtype=torch.bool)
    if edges != "real_virtual":
        off.fill_diagonal_(False)
    total = int(off.sum())
    cut = scores[off].sort().values[total - int(0.3 * total) - 1]
    keep = (scores <= cut + 1e-9) & off
    _same(ours, _literal_samples(a, b, d, e, edges=edges, weights=weights, keep=keep), a, b)


def _literal_scores(a, b, rule, edges):
    """Score by score, in plain loops."""
    p, q = a.softmax(1), b.softmax(1)
    gap = [float(((x - y) * (x.log() - y.log())).sum()) for x, y in zip(p, q)]
    left = {"real": p, "real_virtual": p, "full": torch.cat([p, q])}[edges]
    right = {"real": p, "real_virtual": q, "full": torch.cat([p, q])}[edges]
    scores = torch.zeros(len(left), len(right), dtype=a.dtype)
    for m, x in enumerate(left):
        for n, y in enumerate(right):
            if rule == "joint_entropy_indep":
                scores[m, n] = -(x * x.log()).sum() - (y * y.log()).sum()
            elif rule == "joint_entropy_diag":
                scores[m, n] = -(x * y * (x * y).log()).sum()
            else:
                scores[m, n] = gap[m % len(a)] + gap[n % len(a)]
    return scores


@pytest.mark.parametrize("edges", ["real_virtual", "full"])
@pytest.mark.parametrize("rule", ["joint_entropy_indep", "joint_entropy_diag", "view_discrepancy"])
def test_edge_scores(edges, rule):
    a, b, _, _ = _draw()
    torch.testing.assert_close(edge_scores(a, b, rule, edges), _literal_scores(a, b, rule, edges))


def test_the_surest_edges_stay():
    sure, unsure = [9.0, 0, 0], [0.1, 0, 0]
    a = torch.tensor([sure, unsure])
    b = torch.tensor([[0, 9.0, 0], [0, 0.1, 0]])
    scores = edge_scores(a, b, "joint_entropy_indep")
    assert scores[0, 0] == scores.min()
    assert scores[1, 1] == scores.max()
    d, e = _draw(2, 3, dtype=torch.float32)[2:]
    value = sample_relation_loss(a, b, d, e, pruning="joint_entropy_indep", rho=0.25)
    keep = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(value, _literal_samples(a, b, d, e, keep=keep))


def test_pruning_judges_the_logits_it_is_given():
    a, b, d, e = _draw(size=6)
    vertices = [standardised(z) for z in (a, b, d, e)]
    student, teacher = torch.cat(vertices[:2]), torch.cat(vertices[2:])
    keep = reliable(student, teacher, (a, b), rule="joint_entropy_indep", rho=0.3)
    scores = _literal_scores(a, b, "joint_entropy_indep", "real_virtual")
    expected = scores <= scores.flatten().sort().values[36 - 10 - 1] + 1e-12
    assert (keep == expected).all()
    value = match(student, teacher, sample_graph(keep=keep))
    torch.testing.assert_close(value, _literal_samples(*vertices, keep=keep))


# Gradients and precision.


@pytest.mark.parametrize("edges", ["real_virtual", "full", "real"])
@pytest.mark.parametrize("distance", ["cosine", "huber", "edge_huber"])
def test_sample_gradcheck(edges, distance):
    a, b, d, e = _draw(size=3, classes=4)
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: sample_relation_loss(
            a, b, d, e, edges=edges, distance=distance, sample_weights=rand(3), delta=0.3
        ),
        (a, b),
    )


@pytest.mark.parametrize("distance", ["cosine", "huber"])
def test_class_gradcheck(distance):
    a, b, d, e = _draw(size=2, classes=4)
    student = torch.cat([a, b]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: class_relation_loss(
            z,
            torch.cat([d, e]),
            sample_weights=rand(4),
            class_weights=rand(4, seed=2),
            distance=distance,
            delta=0.3,
        ),
        (student,),
    )


@pytest.mark.parametrize("edges", ["real_virtual", "full"])
@pytest.mark.parametrize("perturbation", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_view_close_to_the_image_keeps_its_gradient(edges, perturbation, precision):
    """Where the plain Gram form in float32 is off by a factor of 1000."""
    a, b, d, e = (
        standardised(z).float() for z in _draw(16, 100, seed=3, perturbation=perturbation)
    )
    a.requires_grad_(), b.requires_grad_()
    ours = _gradients(sample_relation_loss(a, b, d, e, edges=edges), a, b)
    doubles = [z.double() for z in (a, b, d, e)]
    exact = _gradients(_literal_samples(*doubles, edges=edges), a, b)
    for got, expected in zip(ours, exact):
        assert (got - expected).norm() < 1e-3 * expected.norm()


def test_vertices_close_to_each_other_keep_their_gradient():
    """Float32 is tried first, and must see that it is not enough."""
    a, b, d, e = _draw(16, 20)
    a[1], d[1] = a[0] + 1e-4 * a[1], d[0] + 1e-4 * d[1]
    singles = [z.float().requires_grad_() for z in (a, b, d, e)]
    for name, ours, literal in [
        ("samples", sample_relation_loss, _literal_samples),
        ("classes", lambda a, b, d, e: class_relation_loss(a.T, d.T), _classes_of_rows),
    ]:
        got = _gradients(ours(*singles), singles[0])[0]
        doubles = [z.detach().double().requires_grad_() for z in singles]
        expected = _gradients(literal(*doubles), doubles[0])[0]
        assert (got - expected).norm() < 1e-4 * expected.norm(), name


def _classes_of_rows(a, b, d, e):
    return _literal_classes(a.T, d.T)


@pytest.mark.parametrize("size", [16, 64])
def test_float32_holds_five_digits(size):
    a, b, d, e = _draw(size, 100)
    singles = [z.float().requires_grad_() for z in (a, b, d, e)]
    for ours in (sample_relation_loss, lambda a, b, d, e: class_relation_loss(a, d)):
        doubles = [z.detach().double().requires_grad_() for z in singles]
        single, exact = ours(*singles), ours(*doubles)
        torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=0)
        got, expected = _gradients(single, singles[0])[0], _gradients(exact, doubles[0])[0]
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_shift_of_all_vertices_costs_no_precision(precision):
    a, b, d, e = _draw(dtype=torch.float32)
    plain = sample_relation_loss(a, b, d, e)
    moved = sample_relation_loss(a + 1000, b + 1000, d, e)
    torch.testing.assert_close(moved, plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("distance", ["cosine", "huber"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_of_no_length_are_zero_and_have_no_gradient(distance, dtype, precision):
    a, b, d, e = _draw(size=4, dtype=dtype)
    a[1], b[1], b[2] = a[0], a[0], a[2]
    a.requires_grad_(), b.requires_grad_()
    ours = sample_relation_loss(a, b, d, e, distance=distance)
    _same(ours, _literal_samples(a, b, d, e, distance=distance), a, b, rtol=1e-6)
    one = sample_relation_loss(b[2:3], b[2:3], d[:1], e[:1], distance=distance)
    assert one.item() == pytest.approx(0.5 if distance == "cosine" else one.item())
    assert (_gradients(one, b)[0] == 0).all()
    same = sample_relation_loss(b[2:3], b[2:3], d[:1], d[:1], distance=distance)
    assert same == 0


@pytest.mark.parametrize("distance", ["cosine", "huber"])
def test_classes_that_cannot_be_told_apart(distance):
    student = torch.full((6, 4), 0.1).requires_grad_()
    value = class_relation_loss(student, torch.randn(6, 4), distance=distance)
    value.backward()
    assert value.isfinite()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("distance", ["cosine", "huber"])
def test_a_graph_without_edges_has_no_loss(distance):
    one = torch.randn(1, 4, requires_grad=True)
    value = sample_relation_loss(one, None, one, None, edges="real", distance=distance)
    value.backward()
    assert value == 0
    assert (one.grad == 0).all()
    assert class_relation_loss(one[:, :1], one[:, :1], distance=distance) == 0


def test_without_gradient_the_value_is_the_same():
    a, b, d, e = _draw()
    with torch.no_grad():
        quiet = sample_relation_loss(a, b, d, e)
    assert quiet == sample_relation_loss(a.requires_grad_(), b, d, e)


def test_missing_views_are_named():
    a, _, d, _ = _draw()
    with pytest.raises(ValueError, match="edges 'full' need a virtual view"):
        sample_relation_loss(a, None, d, None, edges="full")
    with pytest.raises(ValueError, match="'view_discrepancy' compares two views"):
        sample_relation_loss(a, None, d, None, edges="real", pruning="view_discrepancy")


# What does not change a graph.

cases = st.tuples(st.integers(2, 6), st.integers(2, 8), st.integers(0, 10**6))
some = settings(max_examples=30, deadline=None)
distances = st.sampled_from(["cosine", "huber"])


@some
@given(cases, distances, st.floats(0.1, 10), st.floats(-10, 10))
def test_sample_edges_see_neither_a_common_shift_nor_the_scale(case, distance, scale, shift):
    a, b, d, e = _draw(*case)
    direction = shift * torch.linspace(-1, 1, a.shape[1], dtype=a.dtype)
    torch.testing.assert_close(
        sample_relation_loss(scale * a + direction, scale * b + direction, d, e, distance=distance),
        sample_relation_loss(a, b, d, e, distance=distance),
        rtol=1e-7,
        atol=1e-9,
    )


@some
@given(cases, distances, st.floats(-10, 10))
def test_class_edges_do_not_see_a_constant_per_sample(case, distance, shift):
    a, _, d, _ = _draw(*case)
    constant = shift * torch.linspace(-1, 1, len(a), dtype=a.dtype)[:, None]
    torch.testing.assert_close(
        class_relation_loss(a + constant, d, distance=distance),
        class_relation_loss(a, d, distance=distance),
        rtol=1e-7,
        atol=1e-9,
    )


@some
@given(cases, distances, st.sampled_from(["real_virtual", "full", "real"]))
def test_zero_for_the_same_edges_and_only_for_them(case, distance, edges):
    a, b, d, e = _draw(*case)
    assert sample_relation_loss(2 * d + 1, 2 * e + 1, d, e, edges=edges, distance=distance) < 1e-9
    assert sample_relation_loss(a, b, d, e, edges=edges, distance=distance) > 1e-6
    assert class_relation_loss(2 * d, d, distance=distance) < 1e-9


@some
@given(
    cases,
    st.sampled_from(["real_virtual", "full", "real"]),
    st.sampled_from([None, "joint_entropy_indep", "joint_entropy_diag", "edge_discrepancy"]),
    st.randoms(use_true_random=False),
)
def test_order_of_samples_and_classes_does_not_matter(case, edges, pruning, random):
    views = _draw(*case)
    size, classes, _ = case
    rows, columns = list(range(size)), list(range(classes))
    random.shuffle(rows)
    random.shuffle(columns)
    weights, class_weights = rand(size), rand(classes, seed=2)
    moved = [view[rows][:, columns] for view in views]
    if classes > 2:  # with two classes all edges are +-1/sqrt(2): scores tie up to rounding
        torch.testing.assert_close(
            sample_relation_loss(
                *moved, edges=edges, pruning=pruning, rho=0.3, sample_weights=weights[rows]
            ),
            sample_relation_loss(
                *views, edges=edges, pruning=pruning, rho=0.3, sample_weights=weights
            ),
        )
    torch.testing.assert_close(
        class_relation_loss(
            moved[0], moved[2], sample_weights=weights[rows], class_weights=class_weights[columns]
        ),
        class_relation_loss(
            views[0], views[2], sample_weights=weights, class_weights=class_weights
        ),
    )
