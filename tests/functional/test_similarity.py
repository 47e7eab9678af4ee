"""CKA against published values, its invariances, and the costs between classes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.functional import similarity
from fedkd.functional.similarity import (
    alignment_costs,
    angle_costs,
    linear_cka,
    rbf_cka,
    sharpened,
    unbiased_cka,
)
from tests.golden.published import published
from tests.losses.contract import draw

GOLDEN = published("wasserstein")
CASES = {case["name"]: case for case in GOLDEN["official"] + GOLDEN["not_official"]}
MEASURES = [linear_cka, rbf_cka, unbiased_cka]


def _double(values):
    return torch.tensor(values, dtype=torch.float64)


X, Y = (_double(GOLDEN["inputs"][name]) for name in ("X", "Y"))


def test_cka_repeats_the_official_code():
    assert linear_cka(X, Y).item() == pytest.approx(CASES["cka_linear_precenter"]["value"])
    for sigma in (0.5, 1.0):
        expected = CASES[f"cka_rbf_sigma{sigma}"]["value"]
        assert rbf_cka(X, Y, sigma=sigma).item() == pytest.approx(expected, rel=1e-10)


def test_cka_variants():
    expected = CASES["cka_variants"]
    assert linear_cka(X, Y).item() == pytest.approx(expected["linear_cka"])
    uncentred = linear_cka(X, Y, centred=False)
    assert uncentred.item() == pytest.approx(expected["uncentred_alignment"])
    assert unbiased_cka(X, Y).item() == pytest.approx(expected["unbiased_hsic_linear_cka"])


def _hsic_1(k, m):
    """Song et al.'s estimator as printed."""
    n, k, m = len(k), k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    total = np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ m).sum()
    return total / n / (n - 3)


def test_the_unbiased_measure_is_a_ratio_of_unbiased_estimates():
    x = draw(9, 3)
    y = x[:, :2] + 0.5 * draw(9, 2, seed=9)
    a, b = ((z @ z.T).numpy() for z in (x, y))
    expected = _hsic_1(a, b) / (_hsic_1(a, a) * _hsic_1(b, b)) ** 0.5
    assert unbiased_cka(x, y).item() == pytest.approx(expected)


def test_independent_embeddings_are_not_alike_when_unbiased():
    x, y = draw(200, 100), draw(200, 100, seed=1)
    assert linear_cka(x, y) > 0.3
    assert abs(unbiased_cka(x, y)) < 0.03


@pytest.mark.parametrize("measure", MEASURES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-4, 1e4), size=st.integers(6, 12))
def test_rotation_scale_shift_and_order_do_not_matter(measure, seed, scale, size):
    x, y = draw(size, 4, seed=seed), draw(size, 3, seed=seed + 1)
    rotation, _ = torch.linalg.qr(draw(4, 4, seed=seed + 2))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    moved = measure(scale * (x @ rotation + 3)[order], y[order])
    torch.testing.assert_close(moved, measure(x, y), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(measure(y, x), measure(x, y))


@pytest.mark.parametrize("measure", MEASURES)
def test_alike_to_itself(measure):
    x = draw(8, 3).requires_grad_()
    value = measure(x, x.detach())
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(1)
    assert gradient.abs().max() < 1e-12


def test_narrow_and_wide_forms_agree():
    x, y = draw(6, 2), draw(6, 2, seed=1)
    wide = torch.cat([x, torch.zeros(6, 50, dtype=x.dtype)], dim=1)
    torch.testing.assert_close(linear_cka(wide, y), linear_cka(x, y))


@pytest.mark.parametrize("measure", MEASURES)
def test_similarity_gradcheck(measure):
    weights = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = draw(7, 3).requires_grad_(), draw(7, 2, seed=1) + draw(7, 3)[:, :2]
    assert torch.autograd.gradcheck(lambda z: measure(z, y, weights=weights), (x,))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_sample_without_weight_might_as_well_be_missing(measure):
    x, y = draw(8, 3).requires_grad_(), draw(8, 3, seed=1) + draw(8, 3)
    weights = torch.tensor([1.0, 2, 0, 1, 1, 0, 3, 1])
    counted = weights > 0
    whole, part = (
        measure(x, y, weights=weights),
        measure(x[counted], y[counted], weights=weights[counted]),
    )
    torch.testing.assert_close(whole, part)
    (gradient,) = torch.autograd.grad(whole, x)
    assert (gradient[~counted] == 0).all()
    torch.testing.assert_close(measure(x, y, weights=torch.full((8,), 0.3)), measure(x, y))


def test_weights_are_copies():
    weights, copies = torch.tensor([1.0, 3, 1, 1, 2, 1]), [0, 1, 1, 1, 2, 3, 4, 4, 5]
    torch.testing.assert_close(linear_cka(X, Y, weights=weights), linear_cka(X[copies], Y[copies]))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_what_does_not_vary_is_like_nothing(measure, dtype, value):
    x = torch.full((6, 4), value, dtype=dtype, requires_grad=True)
    y = draw(6, 3).to(dtype)
    for a, b in [(x, y), (y, x), (x, x)]:
        alike = measure(a, b)
        (gradient,) = torch.autograd.grad(alike, x)
        assert alike == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_few_samples_are_finite(measure, size):
    x = draw(size, 4).float().requires_grad_()
    alike = measure(x, 1e4 * draw(size, 3, seed=1).float().sign())
    (gradient,) = torch.autograd.grad(alike, x)
    assert alike.isfinite()
    assert gradient.isfinite().all()
    assert measure(x, x, weights=torch.zeros(size)) == 0


def test_costs_from_angles():
    costs = angle_costs(torch.tensor([[2.0, 0], [0, 3], [-1, 0], [0, 0], [5, 0]]))
    expected = [[0, 1, 2, 1, 0], [1, 0, 1, 1, 1], [2, 1, 0, 1, 2], [1, 1, 1, 0, 1], [0, 1, 2, 1, 0]]
    torch.testing.assert_close(costs, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kappa", [1, 2])
def test_sharpened_angles_repeat_the_official_code(kappa):
    weight = _double(GOLDEN["inputs"]["teacher_fc_weight"]).requires_grad_()
    expected = _double(CASES[f"wkd_cost_sharpen_fc_cosine_k{kappa}"]["value"])
    torch.testing.assert_close(sharpened(angle_costs(weight), kappa), expected + 1e-8)


def test_costs_from_alignment_repeat_the_official_code():
    features = _double(GOLDEN["inputs"]["class_feat"])  # (classes, observations, D)
    expected = _double(CASES["wkd_cost_linear_cka"]["value"])
    costs = alignment_costs(features, torch.arange(6), 6)
    torch.testing.assert_close(costs, expected, rtol=1e-9, atol=1e-12)
    sharp = _double(CASES["wkd_cost_sharpen_cka_k1"]["value"])
    torch.testing.assert_close(sharpened(costs), sharp + 1e-8, rtol=1e-9, atol=1e-12)
    assert torch.equal(sharpened(costs, 0), costs + 1e-8)
    # The same observations as one per sample, in another order of classes but not within one.
    labels = torch.arange(5).repeat_interleave(6).argsort() % 6
    inner = torch.zeros(30, dtype=torch.long)
    for c in range(6):
        inner[labels == c] = 5 * c + torch.arange(5)
    mixed = alignment_costs(features.flatten(0, 1)[inner][:, None], labels, 6)
    torch.testing.assert_close(mixed, costs)


def test_classes_are_cut_to_the_smallest_that_has_any():
    features, labels = draw(9, 4, 3), torch.tensor([0, 1, 1, 0, 3, 3, 3, 0, 1])
    costs = alignment_costs(features, labels, 5)
    two = {0: [0, 3], 1: [1, 2], 3: [4, 5]}
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 3, 3])
    three = alignment_costs(features[[0, 3, 7, 1, 2, 8, 4, 5]], labels, 5)
    for i, rows in two.items():
        for j, columns in two.items():
            alike = linear_cka(features[rows].flatten(0, 1), features[columns].flatten(0, 1))
            assert three[i, j].item() == pytest.approx(1 - alike.item(), abs=1e-12)
    for empty in (2, 4):
        assert costs[empty].tolist() == [float(empty != j) for j in range(5)]
        assert costs[:, empty].tolist() == [float(empty != j) for j in range(5)]


@pytest.mark.parametrize("budget", [2**26, 40])
def test_both_ways_to_align_classes_agree_in_any_blocks(monkeypatch, budget):
    monkeypatch.setattr(similarity._Classwise, "budget", budget)
    classwise = similarity._Classwise(draw(28, 3), torch.arange(28).view(4, 7))
    torch.testing.assert_close(classwise.by_features(), classwise.by_samples())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_constant_classes_and_none_at_all(dtype):
    features = torch.full((4, 1, 3), 0.3, dtype=dtype)
    features[2:] = draw(2, 1, 3).to(dtype)
    costs = alignment_costs(features, torch.tensor([0, 0, 1, 1]), 3)
    torch.testing.assert_close(costs, 1 - torch.eye(3))
    assert torch.equal(alignment_costs(features[:0], torch.arange(0), 3), 1 - torch.eye(3))
