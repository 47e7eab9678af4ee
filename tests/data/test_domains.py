"""Shifts: what each does to pixels, that they repeat, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.data import SHIFTS
from fedkd.data.datasets import load_dataset
from fedkd.data.domains import Shift, coloured, shifted
from fedkd.data.images import ImageSet

TEST = load_dataset("digits")[1]
SUMS = {
    "blur": 1719304,
    "colour": 2643106,
    "edges": 2695830,
    "invert": 4064782,
    "noise": 2024184,
    "plain": 1794098,
    "rotate": 1765313,
    "scale": 608253,
}


def pixels(rows: list[list[int]]) -> ImageSet:
    return ImageSet(torch.tensor([[rows]], dtype=torch.uint8), torch.tensor([0]), ("a", "b"))


def made(images: ImageSet, name: str, **options: float) -> Tensor:
    return shifted(images, Shift(name, options)).images


DOT = pixels([[0] * 9] * 4 + [[0] * 4 + [255] + [0] * 4] + [[0] * 9] * 4)


@pytest.mark.smoke
@pytest.mark.parametrize("name", SHIFTS.names())
def test_a_domain_is_the_same_every_time_and_keeps_its_labels(name: str) -> None:
    first, again = shifted(TEST, name), shifted(TEST, name)
    assert torch.equal(first.images, again.images)
    assert first.images.dtype == torch.uint8
    assert first.shape[1:] == TEST.shape[1:]
    assert torch.equal(first.labels, TEST.labels)
    assert torch.equal(coloured(first).images, coloured(TEST).images) == (name == "plain")
    random = not torch.equal(shifted(TEST, name, "train").images, first.images)
    assert random == (name in ("noise", "colour"))


def test_the_numbers_stay_for_ever() -> None:
    """Sums over scikit-learn's digits: another sum is another data set."""
    sums = {name: int(shifted(TEST, name).images.long().sum()) for name in SHIFTS.names()}
    assert sums == SUMS


def test_an_inverted_image_is_its_complement() -> None:
    assert torch.equal(made(TEST, "invert").int(), 255 - TEST.images.int())


def test_blur_spreads_a_dot_as_a_gaussian() -> None:
    weights = np.exp(-0.5 * (np.arange(-3, 4) / 1.0) ** 2)
    weights /= weights.sum()
    blurred = made(DOT, "blur", sigma=1.0)[0, 0]
    expected = np.rint(255 * np.outer(weights, weights))
    assert blurred[1:8, 1:8].tolist() == expected.tolist()
    flat = pixels([[90] * 5] * 5)
    assert torch.equal(made(flat, "blur"), flat.images)  # the border too


def test_edges_are_where_brightness_changes() -> None:
    step = pixels([[0, 0, 40, 40]] * 3)
    assert made(step, "edges")[0, 0].tolist() == [[0, 40, 40, 0]] * 3
    slope = pixels([[0, 10, 20], [0, 10, 20], [0, 10, 20]])
    assert made(slope, "edges")[0, 0, 1].tolist() == [10, 20, 10]
    corner = pixels([[0, 0, 0], [0, 0, 0], [0, 0, 120]])
    assert made(corner, "edges")[0, 0, 1, 1] == round(30 * math.sqrt(2))


def test_noise_has_the_deviation_that_it_is_given() -> None:
    grey = ImageSet(torch.full((200, 1, 8, 8), 128, dtype=torch.uint8), None, ("a",))
    drawn = made(grey, "noise", sigma=0.1).double() - 128
    assert abs(float(drawn.mean())) < 1
    assert float(drawn.std()) == pytest.approx(25.5, rel=0.03)


def test_a_quarter_turn_and_half_the_size() -> None:
    square = pixels([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert made(square, "rotate", degrees=90)[0, 0].tolist() == [[3, 6, 9], [2, 5, 8], [1, 4, 7]]
    assert torch.equal(made(square, "rotate", degrees=0), square.images)
    white = pixels([[200] * 8] * 8)
    small = made(white, "scale", factor=0.5)[0, 0]
    assert small[2:6, 2:6].eq(200).all()
    assert small.sum() == 16 * 200
    assert made(white, "scale", factor=2.0)[0, 0].eq(200).all()


def test_every_image_has_one_colour() -> None:
    images = shifted(TEST, "colour")
    assert images.shape[0] == 3
    brightest = images.images.amax(dim=(2, 3)).double()
    pure = brightest / brightest.amax(dim=1, keepdim=True)
    assert len({tuple(row) for row in (10 * pure).round().tolist()}) == 10
    # A pixel is the grey one times the colour.
    grey = TEST.images[0, 0].double()
    ratio = images.images[0].double() / grey.clamp(min=1)
    strong = grey > 100
    assert float((ratio.amax(dim=0)[strong] - 1).abs().max()) < 0.01
    assert float(ratio[:, strong].std(dim=1).max()) < 0.01


def test_a_biased_colour_is_the_classs_own() -> None:
    def hues(biased: float) -> list[int]:
        found = shifted(TEST, Shift("colour", {"biased": biased})).images.amax(dim=(2, 3)).tolist()
        assert TEST.labels is not None
        pairs = {(int(label), tuple(rgb)) for label, rgb in zip(TEST.labels, found, strict=True)}
        return [len({rgb for own, rgb in pairs if own == label}) for label in range(10)]

    assert hues(1.0) < [9] * 10
    assert sum(hues(1.0)) < sum(hues(0.0))


def test_colour_pictures_are_tinted_by_their_brightness() -> None:
    red = ImageSet(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1), None, ("a", "b"))
    assert made(red, "colour").max() == round(0.299 * 255)


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (Shift("blurr"), "unknown shift 'blurr'; did you mean 'blur'"),
        (Shift("blur", {"sigm": 1}), "shift 'blur' has no option 'sigm'; did you mean 'sigma'"),
        (Shift("blur", {"sigma": -1}), "shift 'blur': sigma must be positive"),
        (Shift("colour", {"biased": 2}), "shift 'colour': biased must be from 0 to 1"),
        (Shift("scale", {"factor": 0}), "shift 'scale': factor must be positive"),
    ],
)
def test_what_no_domain_is_is_refused(shift: Shift, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shifted(TEST, shift)


def test_colours_by_class_need_labels() -> None:
    with pytest.raises(ValueError, match="biased needs labels"):
        shifted(TEST.unlabelled(), Shift("colour", {"biased": 0.5}))
