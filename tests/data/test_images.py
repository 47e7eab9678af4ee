import pytest
import torch

from fedkd.data import ImageSet
from fedkd.data.images import class_map

PIXELS = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)


def test_only_uint8_images_with_fitting_labels_are_accepted():
    with pytest.raises(ValueError, match=r"must be uint8 .* got torch\.float32"):
        ImageSet(PIXELS.float(), None, ("a",))
    with pytest.raises(ValueError, match="2 images but labels"):
        ImageSet(PIXELS, torch.tensor([0]), ("a",))
    with pytest.raises(ValueError, match="labels run from 0 to 2, but there are 2 classes"):
        ImageSet(PIXELS, torch.tensor([0, 2]), ("a", "b"))


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
