import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedkd.data import arrays
from fedkd.data.arrays import image_set, read_npz
from fedkd.data.datasets import load_dataset
from fedkd.data.local_shard import _read_private

RNG = np.random.default_rng(5)
Y = np.arange(10) % 2


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


RAMP = np.linspace(0, 1, 4 * 8 * 8).reshape(4, 8, 8)


@pytest.mark.parametrize(
    "images",
    [
        (RAMP * 4095).astype(np.uint16),
        (RAMP * 65535).astype(np.uint16),
        (RAMP * 255).astype(np.int64),
        (RAMP * 4000 - 1000).astype(np.int16),
        RAMP > 0.5,
        (RAMP > 0.5).astype(np.int64),
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float16),
        RAMP * 70000,
        (RAMP - RAMP.mean()) / RAMP.std(),
        RAMP * 2 - 1,
    ],
)
def test_following_the_advice_keeps_what_the_pixels_show(images):
    with pytest.raises(ValueError, match="expected uint8 pixels") as error:
        image_set("x", images, None, ("a",))
    message = str(error.value)
    start = min(
        place
        for place in (message.rfind(word) for word in (" ((x", " (x ", " x.", " x["))
        if place > 0
    )
    code = message[start:].strip().split(" (they")[0].split(" if they")[0]
    converted = eval(code, {"x": images, "numpy": np})  # the message's own advice
    assert converted.dtype == np.uint8
    levels = min(len(np.unique(images)), 256)
    assert len(np.unique(converted)) >= 0.8 * levels
    rank = np.argsort(images, axis=None, kind="stable")
    assert (np.diff(converted.ravel()[rank].astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (RAMP * 2 - 1, "normalised already, which fedkd does itself"),
        (np.full((2, 4, 4), np.nan), "not finite"),
        (np.array([["a"]]), "save the pixels as numbers"),
        (pixels(4, 784), r"got \(4, 784\); .*x.reshape\(-1, 28, 28\)"),
        (pixels(4, 3072), r"x.reshape\(-1, 3, 32, 32\)"),
        (pixels(4, 70), r"x.reshape\(-1, height, width\)"),
        (pixels(4), r"got \(4,\)"),
        (pixels(4, 8, 8, 4), r"transparency\? x\[..., :3\]"),
        (pixels(4, 4, 8, 8), r"transparency\? x\[:, :3\]"),
        (pixels(4, 8, 8, 2), r"x\[..., :1\]"),
        (pixels(4, 2, 8, 8, 3), "1 or 3 channels"),
        (pixels(4, 0, 8), "at least one pixel"),
        (pixels(0, 8, 8), "x: no images"),
    ],
)
def test_other_arrays_are_refused_in_words_that_fit(images, message):
    with pytest.raises(ValueError, match=message) as error:
        image_set("x", images, None, ("a",))
    assert "\n" not in str(error.value)


def test_an_ambiguous_layout_and_pixels_of_zero_and_one_are_mentioned(caplog):
    with caplog.at_level(logging.WARNING, "fedkd.data.arrays"):
        assert image_set("x", pixels(4, 3, 8, 3), None, ("a",)).shape == (3, 3, 8)
        image_set("x", pixels(4, 8, 8, 3), None, ("a",))
        image_set("x", pixels(4, 3, 8, 8), None, ("a",))
        image_set("x", pixels(4, 3, 3, 3), None, ("a",))
        assert len(caplog.records) == 1
        assert "may have its channels first or last" in caplog.text
        image_set("x", pixels(4, 8, 8) % 2, None, ("a",))
    assert "all pixels are 0 or 1" in caplog.text


def test_classes_of_an_npz_may_be_bytes_or_numbers(tmp_path):
    for names, expected in (
        ([b"ash", b"birch"], ("ash", "birch")), ([3, 8], ("3", "8")),
    ):  # fmt: skip
        file = save(tmp_path / "a.npz", x=pixels(10, 4, 4), y=Y, classes=np.array(names))
        assert load_dataset("npz", path=file)[0].classes == expected


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a"], "y: labels run from 0 to 1, but there are 1 classes"),
        ([["a", "b"]], "a.npz: classes: expected a list of class names"),
    ],
)
def test_other_classes_are_refused_by_the_files_name(tmp_path, classes, message):
    file = save(tmp_path / "a.npz", x=pixels(10, 4, 4), y=Y, classes=np.array(classes))
    with pytest.raises(ValueError, match=message):
        load_dataset("npz", path=file)


def test_labels_from_one_with_names_say_what_to_subtract(tmp_path):
    file = save(tmp_path / "a.npz", x=pixels(10, 4, 4), y=Y + 1, classes=np.array(["a", "b"]))
    with pytest.raises(ValueError, match=r"from 1 to 2, but there are 2 classes; .*subtract 1"):
        load_dataset("npz", path=file)


def test_a_class_without_images_is_mentioned(tmp_path, caplog):
    names = np.array(["a", "b", "c"])
    file = save(tmp_path / "a.npz", x=pixels(10, 4, 4), y=Y, classes=names)
    with caplog.at_level(logging.WARNING, "fedkd.data.arrays"):
        assert len(load_dataset("npz", path=file)[0].classes) == 3
    assert "no image has class c" in caplog.text


def test_x_and_y_may_come_with_a_test_set_and_nothing_is_left_out_in_silence(tmp_path, caplog):
    x = pixels(10, 4, 4)
    file = save(tmp_path / "a.npz", x=x, y=Y, x_test=x[:4], y_test=Y[:4], x_val=x, note=Y)
    with caplog.at_level(logging.WARNING, "fedkd.data.datasets"):
        train, test = load_dataset("npz", path=file)
    assert (len(train), len(test)) == (10, 4)
    assert "arrays that are not read: note, x_val" in caplog.text
    save(tmp_path / "b.npz", x=x, y=Y, x_test=x)
    with pytest.raises(ValueError, match=r"expected arrays x_train, .* found x, x_test, y"):
        load_dataset("npz", path=tmp_path / "b.npz")


def medmnist(path: Path, *, labels: int = 1) -> Path:
    """A file as MedMNIST publishes them: grey, labels (N, 1) of uint8, rare positives."""
    parts = {"train": 20, "val": 4, "test": 8}
    return save(
        path,
        **{f"{part}_images": pixels(count, 28, 28) for part, count in parts.items()},
        **{
            f"{part}_labels": np.tile((np.arange(count) % 4 == 3).astype(np.uint8)[:, None], labels)
            for part, count in parts.items()
        },
    )


def test_medmnists_files_are_read_as_they_are(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fedkd.data"):
        train, test = load_dataset("npz", path=medmnist(tmp_path / "pneumonia.npz"))
    assert (len(train), len(test), train.shape) == (20, 8, (1, 28, 28))
    assert train.classes == ("0", "1")
    assert test.labels.tolist() == [0, 0, 0, 1] * 2
    assert not caplog.text  # `val_images` are known, and left alone
    chest = medmnist(tmp_path / "chest.npz", labels=14)
    with pytest.raises(ValueError, match=r"chest.npz: train_labels: expected one whole number per"):
        load_dataset("npz", path=chest)


def test_training_and_test_labels_are_numbered_together(tmp_path):
    x = pixels(4, 4, 4)
    y, other = np.array([1, 2, 3, 1]), np.array([3, 2, 1, 1])
    file = save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=other)
    train, test = load_dataset("npz", path=file)
    assert train.classes == test.classes == ("1", "2", "3")
    assert test.labels.tolist() == [2, 1, 0, 0]


def test_the_wrong_kind_of_place_names_the_right_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; .*image_folder"):
        load_dataset("npz", path=tmp_path)
    file = save(tmp_path / "a.npz", x=pixels(10, 4, 4), y=Y)
    with pytest.raises(ValueError, match=r"is a file; .*npz"):
        load_dataset("image_folder", path=file)
    (tmp_path / "config.npz").write_text("rounds: 1\n")
    with pytest.raises(ValueError, match=r"config.npz: not an .npz file .*content is of another"):
        load_dataset("npz", path=tmp_path / "config.npz")
    with pytest.raises(ValueError, match=r"root: expected a folder of local data, .* is a file"):
        load_dataset("cifar10", file)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; set data.root"):
        load_dataset("mnist", tmp_path / "nowhere")
    for bad in ("x" * 5000, "~nobody-of-this-name/x"):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_dataset("npz", path=bad)
        assert "\n" not in str(error.value)


def test_damaged_npz_files_never_raise_anything_else(tmp_path):
    file = save(tmp_path / "a.npz", x=pixels(6, 4, 4), y=Y[:6], classes=np.array(["a", "b"]))
    content = file.read_bytes()
    for _ in range(150):
        changed = bytearray(content)
        for place in RNG.integers(0, len(content), 4):
            changed[place] = RNG.integers(256)
        file.write_bytes(bytes(changed[: RNG.integers(len(content) // 2, len(content) + 1)]))
        message = str(file)
        try:
            load_dataset("npz", path=file)
        except ValueError as error:
            message = str(error)
        assert str(file) in message
        assert "\n" not in message


# -- a node's own images -------------------------------------------------------------------


def same_on_a_node(file: Path) -> None:
    """A node takes the file that the data set took, and means the same classes by it."""
    train, test = load_dataset("npz", path=file)
    own = _read_private(file, train)
    assert own.classes == train.classes
    assert own.class_counts().tolist() == (train.class_counts() + test.class_counts()).tolist()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3), (3, 4, 4)])
@pytest.mark.parametrize("y", [Y, Y.astype(np.uint8)[:, None], Y + 1, Y * 5 + 7, Y.astype(">i4")])
def test_a_node_takes_what_npz_takes(tmp_path, shape, y):
    same_on_a_node(save(tmp_path / "a.npz", x=pixels(10, *shape), y=y))
    names = np.array([b"ash", b"birch"])
    same_on_a_node(save(tmp_path / "b.npz", x=pixels(10, *shape), y=Y, classes=names))


def test_a_nodes_numbers_are_the_classes_of_that_name(tmp_path):
    train, _ = load_dataset("npz", path=save(tmp_path / "a.npz", x=pixels(10, 4, 4), y=Y + 1))
    assert train.classes == ("1", "2")
    own = _read_private(save(tmp_path / "b.npz", x=pixels(3, 4, 4), y=np.array([2, 2, 1])), train)
    assert own.labels.tolist() == [1, 1, 0]
    save(tmp_path / "c.npz", x=pixels(2, 4, 4), y=np.array([0, 1]))
    with pytest.raises(ValueError, match="among the classes 1, 2, found 0"):
        _read_private(tmp_path / "c.npz", train)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": Y.astype(float)}, "own.npz: y: expected whole numbers"),
        ({"y": np.eye(2, dtype=int)[Y]}, "argmax"),
        ({"y": Y + 1}, "subtract 1"),
        ({"y": Y - 1}, "from -1 to 0"),
        ({"y": Y, "classes": np.array(["ash", "elm"])}, "unknown classes elm"),
        ({"x": pixels(10, 4, 4).astype(np.uint16) * 9, "y": Y}, "/ 4095"),
        ({"x": pixels(0, 4, 4), "y": Y[:0]}, "no images"),
        ({"x": pixels(10, 5, 5), "y": Y}, r"images are \(1, 5, 5\), the public ones"),
        ({}, "own.npz: expected arrays x and y"),
    ],
)
def test_a_node_refuses_what_npz_refuses(tmp_path, arrays, message):
    names = np.array(["ash", "birch"])
    whole = save(tmp_path / "all.npz", x=pixels(10, 4, 4), y=Y, classes=names)
    train, _ = load_dataset("npz", path=whole)
    own = save(tmp_path / "own.npz", **{"x": pixels(10, 4, 4), **arrays})
    with pytest.raises(ValueError, match=message):
        _read_private(own, train)


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.5 MB used to take 3.4 GB of memory, before the lengths were compared."""
    monkeypatch.setattr(arrays, "_HARMLESS", 2**20)
    file = tmp_path / "bomb.npz"
    np.savez_compressed(file, x=np.zeros((2000, 32, 32), np.uint8), y=np.zeros(3, np.int64))
    monkeypatch.setattr(np, "load", lambda *_args, **_options: pytest.fail("was unpacked"))
    with pytest.raises(ValueError, match=r"bomb.npz: [\d,]+ bytes unpack to 2,048,\d+, more than"):
        read_npz(file)


def test_what_does_not_fit_into_memory_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large.npz"
    np.savez(file, x=np.zeros((200, 8, 8), np.uint8), y=np.zeros(200, np.int64))
    assert read_npz(file)["x"].shape == (200, 8, 8)
    monkeypatch.setattr(arrays, "_free_memory", lambda: 20_000)
    with pytest.raises(ValueError, match=r"large.npz: holds 0.0 GB, .* are free here"):
        read_npz(file)


def test_a_header_that_announces_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "lies.npz"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (2**40,)}
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", head.getvalue())
    with pytest.raises(ValueError, match="announces 1,099,511,627,776 bytes and has 0"):
        read_npz(file)
