"""DIST: the authors' numbers, Pearson's correlation in NumPy, and the edges."""

import numpy as np
import pytest
import torch

from fedkd.losses.dist import dist_loss
from tests.golden.published import published, repeats
from tests.losses.contract import draw, rand

GOLDEN = published("output_relational")
_double = GOLDEN.double
CASES = [case for case in GOLDEN["official"] if case["name"].startswith("dist")]
EDGES = {case["what"][:12]: case for case in GOLDEN["relational_edge_cases"]}


def _draw(size=6, width=5):
    return draw(2, size, width).unbind()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_dist_repeats_the_official_code(case):
    names = {"beta_inter": "beta", "gamma_intra": "gamma", "tau": "temperature", "eps": "eps"}
    options = {names[key]: value for key, value in case["hyperparameters"].items()}
    logits = _double("logits_s").requires_grad_()
    value = dist_loss(logits, _double("logits_t"), eps_mode="add", **options)
    repeats(case, value, logits)


def test_one_sample_has_no_class_to_correlate():
    case = EDGES["DIST b1 g1 t"]
    student = torch.tensor(case["logits_s"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(case["logits_t"], dtype=torch.float64)
    for mode in ("add", "clamp"):
        options = {"temperature": 1.0, "eps_mode": mode}
        whole = dist_loss(student, teacher, **options)
        intra = dist_loss(student, teacher, beta=0.0, **options)
        inter = dist_loss(student, teacher, gamma=0.0, **options)
        assert whole.item() == pytest.approx(case["official"], rel=1e-7)
        assert inter.item() == pytest.approx(case["inter_only"], rel=1e-7)
        assert intra.item() == case["intra_only"]
        assert (torch.autograd.grad(intra, student)[0] == 0).all()


def test_peaked_predictions_show_where_eps_stands():
    case = EDGES["DIST with ve"]
    student, teacher = (case["scale"] * _double(name) for name in ("logits_s", "logits_t"))

    def value(**options):
        return dist_loss(student, teacher, temperature=1.0, **options).item()

    assert value(eps_mode="add") == pytest.approx(case["official_b1_g1"], rel=1e-10)
    assert value(eps_mode="add", beta=0) == pytest.approx(case["official_intra"], rel=1e-10)
    assert value(eps_mode="add", gamma=0) == pytest.approx(case["official_inter"], rel=1e-10)
    assert value(beta=0) == pytest.approx(case["torchdistill_style_intra_clamped_eps"], rel=1e-10)
    assert value(beta=0, eps=1e-30) == pytest.approx(case["exact_no_eps_intra"], rel=1e-10)


@pytest.mark.parametrize("tau_sq", [True, False])
def test_dist_is_one_minus_the_correlations_of_rows_and_columns(tau_sq):
    student, teacher = _draw()
    value = dist_loss(student, teacher, beta=0.3, gamma=2.0, temperature=2.0, tau_sq=tau_sq)
    p, q = ((z / 2).softmax(1).numpy() for z in (student, teacher))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    expected = (4 if tau_sq else 1) * (0.3 * inter + 2 * intra)
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_weights_are_a_metric_on_samples_and_a_gate_on_classes():
    student, teacher = _draw()
    weights, gate = torch.tensor([1.0, 2, 0, 1, 3, 1]) / 3, rand(5)
    value = dist_loss(student, teacher, weights=weights, class_weights=gate, beta=0.0, tau_sq=False)
    # A sample of weight 2 counts as two samples.
    times = (3 * weights).round().long()
    p, q = ((z / 4).softmax(1).repeat_interleave(times, 0).numpy() for z in (student, teacher))
    each = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)]
    expected = weights.mean().item() * np.mean(gate.numpy() * each)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_a_positive_scale_of_the_probabilities_is_not_seen():
    student, _ = _draw()
    assert dist_loss(student, student).abs() < 1e-12
    assert dist_loss(student, student, eps_mode="add") > 1e-9  # published is not zero
