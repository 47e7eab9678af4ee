import numpy as np
import pytest
import torch

from fedkd.data.images import ImageSet, class_map

PIXELS = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)


def test_what_converts_without_loss_is_converted():
    images = ImageSet(PIXELS.numpy(), np.array([[0], [1]], np.uint8), (b"a", np.str_("b")))
    assert images.images.equal(PIXELS)
    assert images.labels is not None
    assert images.labels.equal(torch.tensor([0, 1]))
    assert images.classes == ("a", "b")
    assert type(images.classes[0]) is str
    assert images.class_counts().tolist() == [1, 1]


def test_arrays_given_are_not_shared():
    pixels = PIXELS.numpy().copy()[:, :, ::-1]
    images = ImageSet(pixels, None, ("a",))
    pixels[:] = 0
    assert images.images.equal(PIXELS.flip(2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS.float() / 255, r"images must be uint8 .*\(images \* 255\)\.round"),
        (PIXELS.float() - 3, r"from_dataset reads them with range=\.\.\. or, if they are no"),
        (PIXELS.to(torch.int64), "images must be uint8"),
        (PIXELS[:, 0], r"images\[:, None\]"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"channels last; .*permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 3, 0, 4, dtype=torch.uint8), "at least one channel and one pixel"),
        (np.zeros((2, 1, 4, 4), ">u2"), "images must be uint8"),
        (np.array(["a"]), "images must be uint8"),
        ([[0, 1]], "images must be a tensor or array, .* got list"),
        (None, "images must be a tensor or array, .* got NoneType"),
    ],
)
def test_other_images_are_refused_with_the_conversion(images, message):
    with pytest.raises(ValueError, match=message) as error:
        ImageSet(images, None, ("a",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0.0, 1.0]), ("a", "b"), "labels: expected whole numbers"),
        (torch.tensor([0]), ("a",), "2 images but labels"),
        (torch.tensor([0, 2]), ("a", "b"), "labels run from 0 to 2, but there are 2 classes"),
        (torch.tensor([1, 2]), ("a", "b"), "labels run from 1 to 2, but there .* subtract 1"),
        (torch.tensor([-1, 0]), ("a", "b"), "labels run from -1 to 0"),
        (torch.tensor([0, 1]), (), "classes: expected at least one"),
        (None, ("a", ""), "classes: name 1"),
    ],
)
def test_other_labels_and_classes_are_refused_by_name(labels, classes, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(PIXELS, labels, classes)


def test_a_subset_keeps_order_labels_and_classes():
    images = ImageSet(PIXELS, torch.tensor([0, 1]), ("a", "b"))
    swapped = images.subset(torch.tensor([1, 0]))
    assert swapped.images.equal(PIXELS.flip(0))
    assert swapped.labels is not None
    assert swapped.labels.tolist() == [1, 0]
    assert swapped.classes == ("a", "b")
    assert images.class_counts().tolist() == [1, 1]
    assert len(images.subset(torch.tensor([], dtype=torch.int64))) == 0


def test_the_fingerprint_sees_pixels_and_order_but_not_labels():
    images = ImageSet(PIXELS, torch.tensor([0, 1]), ("a", "b"))
    assert images.fingerprint() == images.unlabelled().fingerprint()
    assert images.fingerprint() != images.subset(torch.tensor([1, 0])).fingerprint()


def test_statistics_are_those_of_scaled_pixels():
    mean, std = ImageSet(PIXELS, None, ("a",)).statistics()
    expected = PIXELS.double() / 255
    assert mean == pytest.approx(expected.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(expected.std((0, 2, 3), correction=0).tolist())


def test_class_maps_differ_in_names_and_order():
    assert class_map(("a", "b")) == class_map(("a", "b"))
    assert len({class_map(c) for c in [("a", "b"), ("b", "a"), ("ab",), ("a", "b", "c")]}) == 4
