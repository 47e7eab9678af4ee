"""What clients read off maps: averages, class maps, spectral norms."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from fedkd.functional.feature_statistics import averaged, class_maps, spectral_norms
from tests.golden.published import published
from tests.losses.contract import draw

GOLDEN = published("features")
_double = GOLDEN.double


# Small, large and even, large and uneven, upsampled, oblong, too large for a matrix.
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4, 4), (2, 2)), ((7, 7), (4, 4)), ((16, 16), (8, 8)), ((14, 14), (4, 4)),
        ((2, 2), (4, 4)), ((12, 8), (3, 4)), ((17, 18), (5, 5)), ((1, 1), (1, 1)),
    ],
)  # fmt: skip
def test_averaged_equals_adaptive_pooling(shape, size):
    maps = draw(2, 3, *shape).requires_grad_()
    ours, theirs = averaged(maps, size), F.adaptive_avg_pool2d(maps, size)
    weights = draw(2, 3, *size, seed=1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad((weights * pooled).sum(), maps)[0] for pooled in (ours, theirs))
    )


def test_averaged_takes_slices_of_a_larger_map():
    maps = draw(2, 6, 16, 16)[:, ::2].transpose(2, 3)
    torch.testing.assert_close(averaged(maps, (4, 4)), F.adaptive_avg_pool2d(maps, 4))


def test_the_mean_class_map_is_the_logit_less_the_bias():
    case = GOLDEN["derived"]["cam_from_fc_identity"]
    trunk, weight, bias = (_double(name) for name in ("trunk_feat", "fc_weight", "fc_bias"))
    maps = class_maps(trunk, weight)
    torch.testing.assert_close(maps, torch.tensor(case["cam"], dtype=torch.float64))
    logits = F.linear(trunk.mean(dim=(2, 3)), weight, bias)
    torch.testing.assert_close(maps.mean(dim=(2, 3)), logits - bias)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_class_maps_of_averages_are_averages_of_class_maps(size):
    trunk, weight = draw(2, 5, 6, 6), draw(4, 5, seed=1)
    pooled = F.adaptive_avg_pool2d(class_maps(trunk, weight), size)
    torch.testing.assert_close(class_maps(trunk, weight, size), pooled)


def test_both_trunk_and_classifier_learn_from_class_maps():
    trunk, weight = draw(2, 5, 4, 4).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, w: class_maps(t, w, 2), (trunk, weight))


def _stages(seed=0, dtype=torch.float64, batch=3):
    shapes = [(4, 8), (6, 4), (5, 4), (7, 2)]
    return [draw(batch, c, s, s, seed=seed + c, dtype=dtype) for c, s in shapes]


def _svd(stages):
    """Spectral norms by singular value decomposition."""
    norms = []
    for shallow, deep in pairwise(stages):
        shallow = F.adaptive_avg_pool2d(shallow, deep.shape[2:]).flatten(2)
        matrix = shallow @ deep.flatten(2).transpose(1, 2) / shallow.shape[2]
        norms.append(torch.linalg.matrix_norm(matrix, ord=2))
    return torch.stack(norms, dim=1)


def test_spectral_norms_and_their_gradient_are_those_of_the_decomposition():
    stages = [maps.requires_grad_() for maps in _stages()]
    ours, theirs = spectral_norms(stages, iterations=500), _svd(stages)
    weights = draw(3, 3, seed=9)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad((weights * ours).sum(), stages),
        torch.autograd.grad((weights * theirs).sum(), stages),
    )


def test_unrolled_and_exact_meet_after_many_steps():
    stages = [maps.requires_grad_() for maps in _stages()]
    exact = spectral_norms(stages, iterations=500)
    unrolled = spectral_norms(stages, iterations=500, gradient="unrolled")
    torch.testing.assert_close(unrolled, exact)
    torch.testing.assert_close(
        torch.autograd.grad(unrolled.sum(), stages), torch.autograd.grad(exact.sum(), stages)
    )


def test_the_default_errs_less_than_published_and_never_upwards():
    stages, truth = _stages(batch=40), _svd(_stages(batch=40))
    published = spectral_norms(stages, iterations=5, gradient="unrolled")
    default = spectral_norms(stages)
    assert (default <= truth * (1 + 1e-12)).all()
    assert (truth / default).mean() < 1.002
    assert (truth / published).mean() > (truth / default).mean()


@pytest.mark.parametrize("name", ["london_imagenet_variant", "london_cifar_variant"])
def test_unrolled_repeats_the_official_estimates(name):
    options = GOLDEN["official"][name]["hyperparameters"]
    start = [_double("lon_start_3"), _double("lon_start_4")] if "cifar" in name else "ones"
    norms = spectral_norms(
        [_double(f"lon_s{i}") for i in (1, 2, 3)],
        iterations=options["power_iterations"],
        start=start,
        gradient="unrolled",
    )
    # From the note beside the official value: estimates of the student, pair by pair.
    expected = {
        "london_imagenet_variant": [[0.33639964326478844, 0.25835422122332163],
                                    [1.0315495760796338, 1.2604136209848085]],
        "london_cifar_variant": [[0.3363997434314553, 0.2583556974770932],
                                 [1.0315495768218756, 1.2604136241583033]],
    }[name]  # fmt: skip
    torch.testing.assert_close(norms.T, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("gradient", ["exact", "unrolled"])
def test_norms_are_proportional_to_the_maps_over_the_whole_range_of_float32(gradient):
    stages = _stages(dtype=torch.float32)
    norms = spectral_norms(stages, gradient=gradient)
    for factor in (1e-4, 1e4):
        scaled = [(factor * maps).requires_grad_() for maps in stages]
        moved = spectral_norms(scaled, gradient=gradient)
        torch.testing.assert_close(moved, factor**2 * norms, rtol=1e-4, atol=0)
        gradients = torch.autograd.grad(moved.sum(), scaled)
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("gradient", ["exact", "unrolled"])
def test_a_map_of_zeros_has_norm_zero_and_no_gradient(gradient):
    stages = [maps.clone() for maps in _stages(dtype=torch.float32)]
    stages[1][0] = 0
    stages = [maps.requires_grad_() for maps in stages]
    norms = spectral_norms(stages, gradient=gradient)
    assert (norms[0, :2].abs() < 1e-12).all()
    assert (norms[1:] > 0).all()
    gradients = torch.autograd.grad(norms.sum(), stages)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][0] == 0).all()


@pytest.mark.parametrize("gradient", ["exact", "unrolled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype, gradient):
    stages = [maps.to(dtype) for maps in _stages(dtype=torch.float32)]
    norms = spectral_norms(stages, gradient=gradient)
    assert norms.dtype == torch.float32
    full = spectral_norms([maps.float() for maps in stages], gradient=gradient)
    torch.testing.assert_close(norms, full)


def test_samples_and_channels_may_come_in_any_order():
    stages, rows = _stages(), torch.tensor([2, 0, 1])
    norms = spectral_norms(stages)
    torch.testing.assert_close(spectral_norms([m[rows] for m in stages]), norms[rows])
    torch.testing.assert_close(spectral_norms([m.flip(1) for m in stages]), norms)
    torch.testing.assert_close(spectral_norms([m[:1] for m in stages]), norms[:1])


def test_a_uniform_start_is_drawn_from_the_global_generator():
    stages = _stages()
    torch.manual_seed(3)
    first = spectral_norms(stages, iterations=1, start="uniform")
    assert not torch.equal(first, spectral_norms(stages, iterations=1, start="uniform"))
    torch.manual_seed(3)
    assert torch.equal(first, spectral_norms(stages, iterations=1, start="uniform"))


def test_wrong_stages_are_named():
    with pytest.raises(ValueError, match="at least 2 stages, got 1"):
        spectral_norms(_stages()[:1])
    with pytest.raises(ValueError, match=r"stage 0 is \(2, 2\), smaller than the next one, \(4, 4"):
        spectral_norms([torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4)])
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        spectral_norms(_stages(), iterations=0)
