"""Data sets of other libraries become image sets, or are refused in one line."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

import fedkd
from fedkd.data.images import ImageSet
from fedkd.data.pictures import read_picture
from fedkd.data.vision import datasets as vision
from fedkd.data.vision import transforms

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
FLOATS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
read = ImageSet.from_dataset


class Pictures(Dataset[Any]):
    """Items as a function makes them."""

    classes = ("ash", "birch", "cedar")

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, row: int) -> Any:
        return self.make(row), int(LABELS[row])


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (PIXELS, {}),
        (PIXELS.transpose(0, 3, 1, 2), {}),
        (FLOATS, {}),
        (FLOATS.permute(0, 2, 3, 1).numpy() * 2 - 1, {"range": (-1, 1)}),
        (FLOATS.numpy() * 65535, {"range": (0, 65535)}),
        (PIXELS.astype(np.int64), {"range": (0, 255)}),
        ((FLOATS - 0.5) / 0.25, {"mean": [0.5] * 3, "std": [0.25] * 3}),
    ],
    ids=["NHWC", "NCHW", "0..1", "-1..1", "16 bits", "int64", "normalised"],
)
def test_arrays_of_any_layout_and_range_are_the_same_pictures(given, options):
    for labels in (LABELS, torch.from_numpy(LABELS), LABELS.tolist(), LABELS[:, None]):
        images = read(given, labels, **options)
        assert torch.equal(images.images, EXPECTED)
        assert images.labels is not None
        assert images.labels.tolist() == LABELS.tolist()
        assert images.classes == ("0", "1", "2")
    assert torch.equal(read((given, LABELS), **options).images, EXPECTED)


@pytest.mark.parametrize(
    "make",
    [
        lambda row: Image.fromarray(PIXELS[row]),
        lambda row: PIXELS[row],
        lambda row: FLOATS[row],
        lambda row: EXPECTED[row],
    ],
    ids=["PIL", "array", "floats", "bytes"],
)
def test_a_torch_dataset_is_read_item_by_item(make):
    images = read(Pictures(make))
    assert torch.equal(images.images, EXPECTED)
    assert images.classes == ("ash", "birch", "cedar")
    part = read(Subset(Subset(Pictures(make), range(1, 12)), [0, 3]))
    assert torch.equal(part.images, EXPECTED[[1, 4]])
    assert part.classes == ("ash", "birch", "cedar")


def test_items_may_be_dictionaries_and_labels_names():
    items = [{"pixel_values": x, "label": "ab"[y % 2]} for x, y in zip(PIXELS, LABELS)]
    images = read(items)
    assert images.classes == ("a", "b")
    assert images.labels is not None
    assert images.labels.tolist() == (LABELS % 2).tolist()
    other = [{"left": x, "right": x[::-1], "label": y} for x, y in zip(PIXELS, LABELS)]
    with pytest.raises(ValueError, match=r"image: which column holds .* left, right, label; name"):
        read(other)
    assert torch.equal(read(other, image="right").images, EXPECTED.flip(2))


def test_grey_pictures_keep_one_channel_and_coloured_ones_become_grey_if_asked():
    grey = PIXELS[..., 0]
    assert read(grey, LABELS).shape == (1, 8, 8)
    assert read(grey[..., None], LABELS).shape == (1, 8, 8)
    assert read(Pictures(lambda row: Image.fromarray(grey[row]))).shape == (1, 8, 8)
    assert read(grey, LABELS, grey=False).shape == (3, 8, 8)
    first, second = read(PIXELS, LABELS, grey=True), read(Pictures(lambda n: PIXELS[n]), grey=True)
    assert torch.equal(first.images, second.images)
    late = [(grey[0], 0)] * 40 + [(PIXELS[0], 1)]
    with pytest.raises(ValueError, match=r"item 40: is coloured, .* grey=True or grey=False"):
        read(late)


def test_other_sizes_are_resized_as_picture_files_are(tmp_path):
    wide = Pictures(lambda row: PIXELS[row, : 4 + row % 3])
    with pytest.raises(ValueError, match=r"item 0: is 4x8, .* square .* e.g. size=4"):
        read(wide)
    square = Pictures(lambda row: PIXELS[row, : 4 + row % 3, : 4 + row % 3])
    with pytest.raises(ValueError, match=r"item 1: is 5x5 .* the first picture is 4x4 .* size="):
        read(square)
    images = read(wide, size=6)
    Image.fromarray(PIXELS[0, :4]).save(tmp_path / "0.png")
    file = read_picture(tmp_path / "0.png", channels=3, height=6, width=6)
    assert torch.equal(images.images[0], torch.from_numpy(file).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (FLOATS * 255, {}, "pixels are float32 from 0 to 255; say what black and white are with"),
        (FLOATS * 2 - 1, {}, "undo a normalisation with mean="),
        (FLOATS * 0.3, {}, r"floats from 0 to 0.302, .* say what black and white"),
        (FLOATS * 2, {"range": (0, 1)}, r"range=\(0, 1\) was stated for pixels from 0 to 2"),
        (FLOATS, {"range": (1, 0)}, r"range: expected \(lowest, highest\)"),
        (FLOATS, {"mean": [0.5]}, "mean and std: give both"),
        (FLOATS, {"mean": [0.5], "std": [1]}, "expected 3 values each"),
        (FLOATS, {"mean": [9.0] * 3, "std": [1] * 3}, "mean and std leave pixels from 9 to 10"),
        (EXPECTED[:, :, :3], {}, r"\(3, 3, 8\)|is 3x8"),
        (EXPECTED[:, :, :, :3], {}, r"\(3, 8, 3\) may have its channels first or last; say which"),
        (EXPECTED[0, 0], {}, r"expected an array of pictures"),
        (FLOATS.log(), {"range": (0, 1)}, "not finite"),
        (FLOATS, {"layout": "NCHW"}, "layout: expected HWC or CHW"),
        (FLOATS, {"size": 0}, "size: expected pixels"),
        (FLOATS, {"image": "x"}, None),
    ],
)
def test_what_is_ambiguous_is_refused_with_the_remedy(given, options, message):
    if message is None:
        return
    with pytest.raises(ValueError, match=message) as error:
        read(given, LABELS, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": PIXELS}, "expected one data set, got a dict of 'train'"),
        (iter([1]), r"of a stream take a list of its items, list\(...\)"),
        ([], "has no images"),
        ([("cat", 1)], "cat: no such picture file"),
        ([(5, 1)], "item 0: expected a picture"),
        ([(PIXELS[0], -1)], "labels: 1 of 1 are negative"),
        ([(PIXELS[0], [0, 1])], "labels: expected"),
        (PIXELS, "names: there are neither labels nor class names"),
    ],
)
def test_what_is_no_data_set_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read(given)


def test_classes_are_chosen_renamed_and_merged():
    data = Pictures(lambda row: PIXELS[row])
    assert read(data, classes=["cedar", 0]).classes == ("cedar", "ash")
    images = read(data, classes={"ash": "leaf", "cedar": "needle", "birch": "leaf"})
    assert images.classes == ("leaf", "needle")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1] * 4
    for wrong, message in (
        (["oak"], "there is no class 'oak'; there are ash, birch, cedar"),
        (["ahs"], "did you mean 'ash'"),
        ([0, "ash"], "'ash' is named twice"),
        ([0, 0], "expected different ones"),
    ):
        with pytest.raises(ValueError, match=message):
            read(data, classes=wrong)


def _fails_at(*rows: int) -> Pictures:
    def make(row: int) -> Any:
        if row in rows:
            raise OSError("broken data stream")
        return PIXELS[row]

    return Pictures(make)


def test_unreadable_pictures_are_named_or_left_out_with_a_count(caplog):
    with pytest.raises(ValueError, match=r"item 2: .*broken data stream.*skip_unreadable=True"):
        read(_fails_at(2, 5))
    with caplog.at_level(logging.WARNING, "fedkd.data"):
        images = read(_fails_at(2, 5), skip_unreadable=True)
    assert "2 of 12 pictures cannot be read and are left out; the first: item 2" in caplog.text
    assert torch.equal(images.images, EXPECTED[[n for n in range(12) if n not in (2, 5)]])
    with pytest.raises(ValueError, match="none of 12 pictures can be read"):
        read(_fails_at(*range(12)), skip_unreadable=True)


def test_torchvisions_folders_are_read_as_ours_are(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture = Image.fromarray(PIXELS[0, :5])
        turned = picture.getexif()
        turned[0x0112] = 6  # to be turned by a quarter
        picture.save(tmp_path / name / "0.png", exif=turned)
    folder = vision.ImageFolder(str(tmp_path))
    images = read(folder, size=8)
    ours, _ = fedkd.load_dataset("image_folder", path=_twice(tmp_path), size=8)
    assert images.classes == ours.classes == ("cat", "dog")
    assert torch.equal(images.images[0], ours.images[0])
    resized = vision.ImageFolder(
        str(tmp_path), transform=transforms.Compose([transforms.Resize((8, 8))])
    )
    assert read(Subset(resized, [0, 2])).shape == (3, 8, 8)


def _twice(folder: Any) -> Any:
    """Each class needs a picture for training and one for tests."""
    for each in list(folder.glob("*/0.png")):
        each.with_name("1.png").write_bytes(each.read_bytes())
    return folder


def test_the_python_api_takes_torch_datasets():
    train = TensorDataset(FLOATS.repeat(10, 1, 1, 1), torch.from_numpy(np.tile(LABELS, 10)))
    test = TensorDataset(FLOATS[:2], torch.tensor([0, 1]))
    data = fedkd.federate(train, test, clients=2, partition="iid", transfer_size=20, seed=0)
    assert data.test.classes == ("0", "1", "2")
    teacher = fedkd.network("mlp", train)
    fedkd.train_teacher(teacher, train, epochs=1)
    student = fedkd.train_student("mlp", [teacher], data.transfer.images, epochs=1, losses=["kd"])
    assert 0 <= fedkd.evaluate(student, train) <= 1
    with pytest.raises(ValueError, match=r"train: images: pixels.*say what.*from_dataset"):
        fedkd.federate(
            (FLOATS * 9, LABELS), test, clients=2, partition="iid", transfer_size=2, seed=0
        )
    with pytest.raises(ValueError, match="partition: expected a name"):
        fedkd.federate(train, test, clients=2, partition=SimpleNamespace(), transfer_size=2, seed=0)
