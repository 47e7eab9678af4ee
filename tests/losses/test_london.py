"""LONDON's spectral part: official numbers through all steps, weights, edges."""

import pytest
import torch

from fedkd.functional.feature_statistics import spectral_norms
from fedkd.knowledge.kinds import SpectralNorms, Stage
from fedkd.losses.base import TeacherWeights
from fedkd.losses.london import LONDONLoss, london_loss
from tests.golden.published import published, repeats

GOLDEN = published("features")
_double = GOLDEN.double


@pytest.mark.parametrize("name", ["london_imagenet_variant", "london_cifar_variant"])
def test_london_repeats_the_official_code(name):
    case = GOLDEN["official"][name]
    student = [_double(f"lon_s{i}").requires_grad_() for i in (1, 2, 3)]
    options = {
        "iterations": case["hyperparameters"]["power_iterations"],
        "start": [_double("lon_start_3"), _double("lon_start_4")] if "cifar" in name else "ones",
        "gradient": "unrolled",
    }
    teacher = spectral_norms([_double(f"lon_t{i}") for i in (1, 2, 3)], **options)
    value = london_loss(spectral_norms(student, **options), teacher).mean()
    repeats(case, value, student[2], rel=1e-12, rtol=1e-10)


def test_later_pairs_weigh_more():
    student = torch.tensor([[1.0, 3.0], [0.0, 1.0]])
    torch.testing.assert_close(
        london_loss(student, torch.zeros(2, 2)), torch.tensor([0.25 + 0.5 * 9, 0.5])
    )
    four = london_loss(torch.ones(1, 3), torch.zeros(1, 3))
    torch.testing.assert_close(four, torch.tensor([1 / 8 + 1 / 4 + 1 / 2]))


def test_relative_differences_do_not_see_a_common_scale():
    student, teacher = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]])
    torch.testing.assert_close(
        london_loss(student, teacher, relative=True), torch.tensor([0.25 / 4 + 0.5 / 16])
    )
    torch.testing.assert_close(
        london_loss(1e4 * student, 1e4 * teacher, relative=True),
        london_loss(student, teacher, relative=True),
    )
    assert london_loss(student, torch.zeros(1, 2), relative=True).isfinite().all()


@pytest.mark.parametrize("relative", [False, True])
def test_london_gradcheck_and_order(relative):
    student = torch.tensor([[1.0, 3.0], [0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0], [0.5, 4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: london_loss(s, teacher, relative=relative), (student,)
    )
    loss = london_loss(student, teacher, relative=relative)
    moved = london_loss(student.flip(0), teacher.flip(0), relative=relative)
    torch.testing.assert_close(moved, loss.flip(0))
    assert (london_loss(teacher, teacher, relative=relative) == 0).all()


def _batch():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            Stage(index): torch.randn(4, width, side, side, generator=generator)
            for index, width, side in ((-3, 3, 8), (-2, 4, 4), (-1, 5, 4))
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize("gradient", ["exact", "unrolled"])
def test_the_class_reads_norms_or_maps(gradient):
    student, teacher = _batch()
    loss = LONDONLoss(iterations=200, gradient=gradient)
    (kind,) = loss.needs
    assert kind == SpectralNorms(3, 200)
    seen = dict(student)
    seen[kind] = spectral_norms(list(student.values()), iterations=200)
    sent = {kind: spectral_norms(list(teacher.values()), iterations=200)}
    value = loss({k: seen[k] for k in loss.reads}, sent, None, TeacherWeights(torch.ones(4)))
    torch.testing.assert_close(value, london_loss(seen[kind], sent[kind]), rtol=1e-4, atol=1e-6)
