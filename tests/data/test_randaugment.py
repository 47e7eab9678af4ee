"""RandAugment for a whole batch: each operation is torchvision's, each image has its own."""

import pytest
import torch
from torch import Tensor

from fedkd.data.randaugment import OPERATIONS, _all_at_once, _tables, randaugment_batch
from fedkd.data.vision import transforms
from fedkd.randomness import beside, stream

NAMES = {
    "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "color": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize",
    "solarize": "Solarize", "autocontrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip


def pictures(count: int, shape: tuple[int, int, int]) -> Tensor:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=stream(0, "p"))
    images[0] = 7  # flat
    images[1] = images[1] // 8 + 100  # pale
    return images


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 40, 24), (1, 2, 8)])
@pytest.mark.parametrize("magnitude", [9, 30])
def test_an_operation_is_torchvisions(
    name: str, shape: tuple[int, int, int], magnitude: int
) -> None:
    theirs = transforms.RandAugment()
    images = pictures(6, shape)
    signs = torch.tensor([1.0, -1.0] * 3).view(-1, 1, 1, 1)
    find, signed = theirs._AUGMENTATION_SPACE[NAMES[name]]
    sizes = find(31, *shape[1:])
    size = 0.0 if sizes is None else float(sizes[magnitude])
    expected = torch.stack(
        [
            theirs._apply_image_or_video_transform(
                image,
                NAMES[name],
                size * (float(sign) if signed else 1),
                interpolation=transforms.InterpolationMode.NEAREST,
                fill=theirs._fill,
            )
            for image, sign in zip(images, signs, strict=True)
        ]
    )
    ours = OPERATIONS[name](images, signs, magnitude / 30)
    assert ours.dtype == torch.uint8
    # A level of grey where a product is cut to a whole number; a pixel where two are as near.
    far = (ours.int() - expected.int()).abs() > 1
    assert far.float().mean() < 0.01


def test_every_operation_and_both_directions_are_drawn() -> None:
    assert set(NAMES) == set(OPERATIONS)
    image = pictures(3, (3, 16, 16))[2]
    batch = randaugment_batch(image.expand(1500, -1, -1, -1), stream(0, "draw"), operations=1)
    seen = {picture.numpy().tobytes() for picture in batch}
    two_ways = 9  # the signed operations
    assert len(seen) == len(OPERATIONS) + two_ways


def test_images_keep_their_places() -> None:
    dark, bright = torch.full((40, 1, 8, 8), 40), torch.full((40, 1, 8, 8), 200)
    images = torch.cat([dark, bright]).to(torch.uint8)
    changed = randaugment_batch(images, stream(0, "places"), operations=1, magnitude=3).float()
    centre = changed[:, 0, 4, 4]
    assert centre[:40].median() < 80 < 160 < centre[40:].median()
    assert randaugment_batch(images[:0], stream(0, "none")).shape == (0, 1, 8, 8)


def test_draws_come_from_the_generator_alone() -> None:
    images = pictures(32, (3, 8, 8))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = randaugment_batch(images, stream(1, "a"))
    assert torch.get_rng_state().equal(before)
    assert first.equal(randaugment_batch(images, stream(1, "a")))
    assert not first.equal(randaugment_batch(images, stream(1, "b")))
    generator = stream(1, "a")
    assert beside(generator, torch.device("cpu")) is generator


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 40, 24), (1, 2, 8)])
@pytest.mark.parametrize("magnitude", [4, 9, 30])
def test_any_mixture_of_operations_is_one_look_up(
    shape: tuple[int, int, int], magnitude: int
) -> None:
    """The way of an accelerator, where nothing may be fetched: bit by bit the same."""
    images, share = pictures(2 * len(OPERATIONS), shape), magnitude / 30
    tables = _tables(*shape, share, torch.device("cpu"))
    for first in (0, 1):
        rows = (torch.arange(len(images)) + first) % (2 * len(OPERATIONS))
        mixed = tables.apply(images, rows)
        for number, image, changed in zip(rows.tolist(), images, mixed, strict=True):
            change = list(OPERATIONS.values())[number // 2]
            signs = torch.full((1, 1, 1, 1), 2.0 * (number % 2) - 1)
            assert changed.equal(change(image[None], signs, share)[0]), change.__name__


def test_a_device_draws_from_its_generator_alone() -> None:
    images = pictures(32, (3, 8, 8))
    first = _all_at_once(images, stream(1, "a"), 2, 0.3)
    assert first.equal(_all_at_once(images, stream(1, "a"), 2, 0.3))
    assert not first.equal(_all_at_once(images, stream(1, "b"), 2, 0.3))
    assert first.shape == images.shape
