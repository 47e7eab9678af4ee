"""DP-SGD: clipped sums are those of a loop over images, and the noise is as large as promised."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedkd.data.images import ImageSet
from fedkd.models import MODELS
from fedkd.models.network import Network
from fedkd.privacy.clipping import ClippedSteps, Clipping
from fedkd.privacy.dp_sgd import Mechanism, fit_private, poisson
from fedkd.privacy.model_check import example_cross_entropy
from fedkd.privacy.noise import SecureGenerator
from fedkd.training.optimizers import Optimizer, make_optimizer

CLIPPINGS: tuple[Clipping, ...] = ("hooks", "ghost")
PLAIN = Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0, schedule="cosine")
CLASSES = tuple("abcd")


def named(name: str = "cnn_tiny", **options: object) -> Network:
    torch.manual_seed(0)
    body = MODELS.create(name, len(CLASSES), 1, 8, **options)
    return Network(body, mean=[0.5], std=[0.25])


def images(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.randint(4, (count,), generator=generator), CLASSES)


def flat(network: Network) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def gradient(network: Network, shard: ImageSet, index: int) -> Tensor:
    """Of one image alone, by plain backward."""
    one = slice(index, index + 1)
    loss = functional.cross_entropy(network(shard.images[one]), shard.labels[one])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def clipped(
    network: Network, criterion: Callable[..., Tensor], bound: float, size: float, how: Clipping
) -> ClippedSteps:
    """Noiseless steps of lr 1."""
    return ClippedSteps(
        network, criterion, torch.optim.SGD(network.parameters(), lr=1.0), noise_multiplier=0.0,
        max_grad_norm=bound, expected_batch_size=size, clipping=how,
    )  # fmt: skip


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("cnn_tiny", {"norm": "group"}), ("mlp", {}), ("resnet8", {"norm": "group"})],
)
def test_a_step_is_the_sum_of_gradients_clipped_one_by_one(
    name: str, options: dict[str, object], clipping: Clipping
) -> None:
    network, shard = named(name, **options), images(6)
    rows = torch.stack([gradient(copy.deepcopy(network).train(), shard, i) for i in range(6)])
    norms = rows.norm(dim=1)
    bound = float(norms.median())  # some are clipped, some are not
    expected = (rows * (bound / (norms + 1e-6)).clamp(max=1)[:, None]).sum(0) / 4
    before = flat(network)
    with clipped(network, example_cross_entropy, bound, 4.0, clipping) as steps:
        steps.step([(shard.images[:2], shard.labels[:2]), (shard.images[2:], shard.labels[2:])])
    moved = before - flat(network)
    assert float((moved - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_without_noise_and_clipping_it_is_plain_sgd_on_the_same_draws(clipping: Clipping) -> None:
    shard = images(20)
    private, plain = named(), named().train()
    mechanism = Mechanism(0.4, 8.0, 5, 0.0, max_grad_norm=1e9, clipping=clipping, physical_batch=3)
    fit_private(private, shard, mechanism, optimizer=PLAIN, seed=3)
    optimizer, schedule = make_optimizer(plain.parameters(), PLAIN, 5)
    draws = SecureGenerator(3)
    for _ in range(5):
        drawn = poisson(20, 0.4, draws)
        optimizer.zero_grad()
        loss = functional.cross_entropy(
            plain(shard.images[drawn]), shard.labels[drawn], reduction="sum"
        )
        (loss / 8).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(flat(private), flat(plain), atol=1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_an_empty_shard_moves_the_teacher_by_noise_of_the_promised_size(clipping: Clipping) -> None:
    # One step of lr 1: noise multiplier 3 times clipping norm 0.5 over an expected batch of 10.
    network = named("mlp", hidden=128)
    before = flat(network)
    constant = Optimizer(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    mechanism = Mechanism(0.5, 10.0, 1, 3.0, max_grad_norm=0.5, clipping=clipping)
    fit_private(network, images(0), mechanism, optimizer=constant, seed=0, noise_seed=0)
    noise = flat(network) - before
    assert float(noise.std()) == pytest.approx(3 * 0.5 / 10, rel=0.03)
    assert abs(float(noise.mean())) < 0.005


def test_noise_is_added_once_per_step_however_many_pieces_the_batch_has() -> None:
    shard = images(40)
    once, often = named(), named()
    for network, size in ((once, 256), (often, 7)):
        mechanism = Mechanism(0.9, 36.0, 3, 1.0, physical_batch=size)
        fit_private(network, shard, mechanism, optimizer=PLAIN, seed=1, noise_seed=1)
    assert torch.allclose(flat(once), flat(often), atol=1e-5)


@pytest.mark.parametrize("which", ["seed", "noise_seed"])
def test_all_bits_of_the_seeds_of_draws_and_noise_matter(which: str) -> None:
    ends = []
    for value in (7, 7 + 2**32):
        network = named()
        seeds = {"seed": 7, "noise_seed": 7, which: value}
        fit_private(network, images(40), Mechanism(0.5, 20.0, 2, 1.0), optimizer=PLAIN, **seeds)
        ends.append(flat(network))
    assert not torch.equal(*ends)


def test_two_trainings_of_one_seed_differ_by_the_noise_alone() -> None:
    shard = images(10)
    for multiplier in (0.0, 1.0):
        networks = [named(), named()]
        for network in networks:
            fit_private(network, shard, Mechanism(0.5, 5.0, 2, multiplier), optimizer=PLAIN, seed=1)
        assert torch.equal(*map(flat, networks)) == (multiplier == 0)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_ten_images_with_batches_that_are_mostly_empty(clipping: Clipping) -> None:
    network = named()
    before = flat(network)
    mechanism = Mechanism(0.02, 1.0, 20, 1.0, clipping=clipping)
    fit_private(network, images(10), mechanism, optimizer=PLAIN)
    after = flat(network)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    assert not network.training
    assert not any(hasattr(p, "summed_grad") for p in network.parameters())
    fit_private(network, images(10), mechanism, optimizer=PLAIN)  # the next round


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_an_image_without_a_finite_gradient_does_not_spoil_the_sum(clipping: Clipping) -> None:
    network, shard = named("mlp"), images(3)
    twin = copy.deepcopy(network)

    def criterion(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return example_cross_entropy(logits, labels) * scale

    for subject, rows, scale in (
        (network, [0, 1, 2], [1.0, float("inf"), 1.0]),
        (twin, [0, 2], [1.0, 1.0]),
    ):
        part = shard.subset(torch.tensor(rows))
        with clipped(subject, criterion, 1.0, 3.0, clipping) as steps:
            steps.step([(part.images, part.labels, torch.tensor(scale))])
    assert torch.allclose(flat(network), flat(twin), atol=1e-6)


def test_the_mechanism_follows_from_the_nominal_size_alone() -> None:
    mechanism = Mechanism.of(100, 32, 3, 1.5, max_grad_norm=0.5)
    assert mechanism == Mechanism(0.32, 32.0, 12, 1.5, 0.5)
    assert Mechanism.of(10, 32, 2, 1.0) == Mechanism(1.0, 10.0, 2, 1.0)
    with pytest.raises(ValueError, match="sample_rate: expected more than 0 and at most 1, got 0"):
        Mechanism(0, 1.0, 1, 1.0)


def test_what_would_break_the_guarantee_is_refused() -> None:
    mechanism = Mechanism(0.5, 5.0, 1, 1.0)
    with pytest.raises(ValueError, match="mixes the images of a batch"):
        fit_private(named(norm="batch"), images(5), mechanism)
    clipped = Optimizer(max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"teachers\.optimizer\.max_grad_norm clips"):
        fit_private(named(), images(5), mechanism, optimizer=clipped)
    with pytest.raises(ValueError, match="no labels"):
        fit_private(named(), images(5).unlabelled(), mechanism)
