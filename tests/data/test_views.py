import pytest
import torch

from fedkd.data.views import AUGMENTATIONS, augment_batch, virtual_view
from fedkd.randomness import stream

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 40, 24)]


def pictures(count: int, shape: tuple[int, int, int] = (3, 32, 32)) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=stream(0, "test"))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_of_a_subset_is_the_subset_of_the_view(shape):
    images = pictures(12, shape)
    whole = virtual_view(images, seed=1, view=0, flip=True)
    order = torch.tensor([7, 2, 11, 0])
    part = virtual_view(images[order], seed=1, view=0, indices=order, flip=True)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    assert part.equal(whole[order])


def test_seed_view_and_image_have_their_own_draws():
    images = pictures(1).expand(8, -1, -1, -1)
    first = virtual_view(images, seed=1, view=0)
    assert len({image.numpy().tobytes() for image in first}) > 6
    assert not first.equal(virtual_view(images, seed=1, view=1))
    assert not first.equal(virtual_view(images, seed=2, view=0))


def test_the_global_generator_is_neither_read_nor_moved():
    images = pictures(4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = virtual_view(images, seed=1, view=0)
    batch = augment_batch(images, "randaugment", 1, "a")
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert virtual_view(images, seed=1, view=0).equal(first)
    assert augment_batch(images, "randaugment", 1, "a").equal(batch)


def test_a_stronger_view_is_further_away():
    images = pictures(60, (1, 16, 16)) // 2 + 40
    images[:, :, 4:12, 4:12] = 220

    def distance(strength: str) -> float:
        view = virtual_view(images, seed=0, view=0, strength=strength)
        return float((view.float() - images.float()).abs().mean())

    assert distance("weak") < distance("strong")


def test_large_images_and_empty_sets_work():
    assert virtual_view(pictures(1, (3, 224, 224)), seed=0, view=0).shape == (1, 3, 224, 224)
    assert virtual_view(pictures(0), seed=0, view=0).shape == (0, 3, 32, 32)


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="unknown strength 'storng'; did you mean 'strong'"):
        virtual_view(pictures(1), seed=0, view=0, strength="storng")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 images but 1 indices"):
        virtual_view(pictures(2), seed=0, view=0, indices=[0])
    with pytest.raises(ValueError, match="must be uint8"):
        virtual_view(pictures(2).float(), seed=0, view=0)
    with pytest.raises(ValueError, match="unknown augmentation 'crop-flip'; did you mean"):
        augment_batch(pictures(1), "crop-flip", 0)


@pytest.mark.parametrize("recipe", list(AUGMENTATIONS))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_depends_on_its_stream_alone(recipe, shape):
    images = pictures(16, shape)
    kept = images.clone()
    first = augment_batch(images, recipe, 3, "augment", 0, 1)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert first.equal(augment_batch(images, recipe, 3, "augment", 0, 1))
    assert images.equal(kept)
    if recipe == "none":
        assert first.equal(images)
    else:
        assert not first.equal(augment_batch(images, recipe, 3, "augment", 0, 2))


def test_crops_are_shifts_and_each_image_has_its_own():
    image = pictures(1, (1, 8, 8))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0]
    shifts = {padded[:, i : i + 8, j : j + 8].numpy().tobytes() for i in range(3) for j in range(3)}
    seen = {c.numpy().tobytes() for c in augment_batch(image.expand(200, -1, -1, -1), "crop", 0)}
    assert seen == shifts


def test_about_half_of_the_images_are_mirrored():
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(400, 1, 16, 16)
    batch = augment_batch(ramp, "crop_flip", 0)
    mirrored = (batch[:, 0, 8, 4] > batch[:, 0, 8, 11]).float().mean()
    assert 0.4 < mirrored < 0.6
