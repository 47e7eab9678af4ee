"""RKD: the authors' numbers, both parts written out, and the edges."""

import pytest
import torch
from torch.nn import functional as F

import fedkd.losses.rkd as rkd
from fedkd.knowledge.kinds import Logits, Pooled, Stage
from fedkd.losses import LOSSES
from fedkd.losses.base import TeacherWeights
from fedkd.losses.dist import dist_loss
from fedkd.losses.rkd import rkd_loss
from fedkd.losses.sp import sp_loss
from tests.golden.published import published, repeats
from tests.losses.contract import draw, rand

GOLDEN = published("output_relational")
_double = GOLDEN.double
CASES = [case for case in GOLDEN["official"] if case["name"].startswith("rkd")]
EDGES = [case for case in GOLDEN["relational_edge_cases"] if case["what"].startswith("RKD")]


def _draw(size=6, width=5):
    return draw(2, size, width).unbind()


def _literal(student, teacher, weights=None, *, distance_weight=25.0, angle_weight=50.0):
    """Every distance and every angle written out."""
    size = len(student)
    weights = torch.ones(size, dtype=student.dtype) if weights is None else weights
    pairs = torch.outer(weights, weights).sqrt().fill_diagonal_(0)
    triples = torch.einsum("i,j,k->ijk", weights, weights, weights).pow(1 / 3)

    def scaled(x):
        lengths = (x[:, None] - x + 1e-30).norm(dim=-1)
        return (1 - torch.eye(size)) * lengths / ((pairs * lengths).sum() / pairs.sum())

    def angles(x):
        edges = F.normalize(x[None] - x[:, None], dim=-1)
        return edges @ edges.mT

    each = F.smooth_l1_loss(scaled(student), scaled(teacher), reduction="none")
    distance = (pairs * each).sum() / size**2
    each = F.smooth_l1_loss(angles(student), angles(teacher), reduction="none")
    return distance_weight * distance + angle_weight * (triples * each).sum() / size**3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rkd_repeats_the_official_code(case):
    options = {"eps": 1e-12, "squared": False} | case["hyperparameters"]
    if "distance_weight" not in options:
        options["distance_weight"] = float("distance" in case["name"])
        options["angle_weight"] = float("angle" in case["name"])
    options.pop("p", None)
    of = case["grad_wrt"]
    features = _double(of).requires_grad_()
    value = rkd_loss(features, _double(of.removesuffix("s") + "t"), **options)
    repeats(case, value, features)


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case["what"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_cases(case, dtype):
    """One sample, where the official code is NaN, and two samples that are the same."""
    features = torch.tensor(case.get("feat_s", [[1.0, 2]]), dtype=dtype, requires_grad=True)
    teacher = torch.tensor(case.get("feat_t", [[2.0, 1]]), dtype=dtype)
    distance, angle = (float(word in case["what"]) for word in ("distance", "angle"))
    value = rkd_loss(features, teacher, distance_weight=distance, angle_weight=angle)
    value.backward()
    assert value.item() == float(case.get("sane", case["official"]))
    assert (features.grad == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 2**16])
def test_rkd_equals_the_literal_one(weighted, block, monkeypatch):
    monkeypatch.setattr(rkd, "_BLOCK", block)  # angles some vertices at a time
    student, teacher = _draw()
    student.requires_grad_()
    weights = rand(6) if weighted else None
    for options in ({}, {"distance_weight": 0.0}, {"angle_weight": 0.0}):
        ours = rkd_loss(student, teacher, weights=weights, **options)
        literal = _literal(student, teacher, weights, **options)
        torch.testing.assert_close(ours, literal, rtol=1e-10, atol=0)
        got, expected = (torch.autograd.grad(v, student)[0] for v in (ours, literal))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "scale", "apart"),
    [(rkd_loss, 1, 1), (rkd_loss, 1, 1e-3), (dist_loss, 1e-3, 1)],  # nearly even predictions
)
def test_float32_holds_five_digits(loss, scale, apart):
    student, teacher = (scale * z for z in _draw(16, 32))
    student[1] = student[0] + apart * (student[1] - student[0])
    found = []
    for dtype in (torch.float32, torch.float64):
        features = student.float().to(dtype).requires_grad_()
        value = loss(features, teacher.float().to(dtype))
        (gradient,) = torch.autograd.grad(value, features)
        found.append((value.detach().double(), gradient.double()))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-5, atol=1e-5 * double.abs().max())


def test_neither_scale_nor_rotation_nor_shift_is_seen():
    student, _ = _draw()
    rotation = torch.linalg.qr(_draw(5, 5)[0]).Q
    assert rkd_loss(3 * student @ rotation + 7, student) < 1e-12


@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
def test_maps_are_flattened_and_widths_may_differ(loss):
    student, teacher = _draw(6, 8)[0], _draw(6, 5)[1]
    torch.testing.assert_close(loss(student.view(6, 2, 2, 2), teacher), loss(student, teacher))


@pytest.mark.parametrize(
    ("name", "space", "kind"),
    [
        ("rkd", "features", Pooled()),
        ("rkd", "logits", Logits()),
        ("sp", "map", Stage(-1)),
        ("sp", "features", Pooled()),
    ],
)
def test_space_chooses_what_is_shared(name, space, kind):
    student, teacher = _draw()
    loss = LOSSES.create(name, space=space)
    assert loss.needs == loss.reads == (kind,)
    value = loss({kind: student}, {kind: teacher}, None, TeacherWeights(torch.ones(6)))
    expected = {"rkd": rkd_loss, "sp": sp_loss}[name](student, teacher)
    torch.testing.assert_close(value, expected)
