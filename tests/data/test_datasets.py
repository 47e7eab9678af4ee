import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkd.data import DATASETS
from fedkd.data.datasets import CIFAR10, CIFAR100, FASHION, load_dataset

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(folder: Path, zipped: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    arrays = {}
    for stem, count in (("train", 12), ("t10k", 4)):
        images = RNG.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            arrays[f"{stem}-{name}"] = array
            file = folder / f"{stem}-{name}-ubyte"
            if zipped:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                file.write_bytes(idx(array))
    return arrays


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def labelled(count: int, shape: tuple[int, ...], classes: int = 2) -> dict[str, np.ndarray]:
    pixels = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
    return {"x": pixels, "y": np.arange(count) % classes}


def picture(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


# -- digits and synthetic ------------------------------------------------------------------


def test_digits_are_scaled_to_bytes_and_split_the_same_way_every_time():
    train, test = load_dataset("digits")
    assert (train.images.shape, test.images.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert int(train.images.max()) == 255
    assert train.classes == tuple("0123456789")
    share = test.class_counts() / (train.class_counts() + test.class_counts())
    assert share.sub(0.2).abs().max() < 0.005
    again = load_dataset("digits")
    assert [s.fingerprint() for s in again] == [train.fingerprint(), test.fingerprint()]


def test_synthetic_patterns_can_be_told_apart_and_do_not_change():
    train, test = load_dataset("synthetic", classes=3, size=10, channels=3, per_class=20)
    assert train.shape == (3, 10, 10)
    assert train.class_counts().tolist() == [20, 20, 20]
    assert test.class_counts().tolist() == [10, 10, 10]
    means = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(3)])
    distances = torch.cdist(test.images.float().flatten(1), means.flatten(1))
    assert (distances.argmin(1) == test.labels).all()
    again = load_dataset("synthetic", classes=3, size=10, channels=3, per_class=20)
    assert again[0].fingerprint() == train.fingerprint()


def test_every_data_set_has_a_summary_and_checks_its_options():
    assert {"digits", "fashion_mnist", "cifar10", "npz", "image_folder"} <= set(DATASETS.names())
    assert all(DATASETS.summary(name) for name in DATASETS.names())
    with pytest.raises(ValueError, match="has no option 'classses'; did you mean 'classes'"):
        load_dataset("synthetic", classses=3)
    with pytest.raises(ValueError, match="'image_folder': size"):
        load_dataset("image_folder", size="big")


# -- the MNIST family ----------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_plain_or_gzipped_and_nothing_is_written(tmp_path, zipped):
    arrays = write_mnist(tmp_path / "FashionMNIST" / "raw", zipped)
    before = sorted(tmp_path.rglob("*"))
    train, test = load_dataset("fashion_mnist", tmp_path)
    assert train.images[:, 0].numpy().tolist() == arrays["train-images-idx3"].tolist()
    assert test.labels.tolist() == arrays["t10k-labels-idx1"].tolist()
    assert train.classes == FASHION
    assert sorted(tmp_path.rglob("*")) == before


def test_some_classes_are_kept_and_counted_anew(tmp_path):
    arrays = write_mnist(tmp_path / "FashionMNIST" / "raw", zipped=False)
    labels = arrays["train-labels-idx1"].tolist()
    first, second = labels[0], next(label for label in labels if label != labels[0])
    train, _ = load_dataset("fashion_mnist", tmp_path, classes=[first, second])
    assert train.classes == (FASHION[first], FASHION[second])
    assert train.labels.tolist() == [
        [first, second].index(k) for k in labels if k in (first, second)
    ]
    with pytest.raises(ValueError, match="expected different ones, got"):
        load_dataset("fashion_mnist", tmp_path, classes=[3, 3])


def test_the_root_may_come_from_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "MNIST" / "raw", zipped=True)
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    assert len(load_dataset("mnist")[0]) == 12


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"set data\.root or FEDKD_DATA to a folder"):
        load_dataset("fashion_mnist")
    write_mnist(tmp_path / "KMNIST" / "raw", zipped=False)
    absent = tmp_path / "KMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    absent.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_dataset("kmnist", tmp_path)
    message = str(error.value)
    assert str(absent) in message
    assert "train-images-idx3-ubyte," not in message
    assert f"datasets.KMNIST('{tmp_path}', download=True)" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x03\x00", idx(np.zeros(9, np.uint8))[:-1]])
def test_a_damaged_idx_file_is_named(tmp_path, content):
    write_mnist(tmp_path / "MNIST" / "raw", zipped=False)
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte: not a complete idx file"):
        load_dataset("mnist", tmp_path)


def test_idx_files_in_the_wrong_place_or_of_other_lengths_are_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, zipped=False)
    labels = raw / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes((raw / "train-images-idx3-ubyte").read_bytes())
    with pytest.raises(ValueError, match="labels-idx1-ubyte: expected an idx file of 1 axes"):
        load_dataset("mnist", tmp_path)
    labels.write_bytes(idx(np.arange(3, dtype=np.uint8)))
    with pytest.raises(ValueError, match="images-idx3-ubyte: 12 images but labels"):
        load_dataset("mnist", tmp_path)
    labels.write_bytes(whole[:-1] + b"\x0b")
    with pytest.raises(ValueError, match="images-idx3-ubyte: labels run from 0 to 11"):
        load_dataset("mnist", tmp_path)


def test_a_cut_gzip_file_is_named(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw", zipped=True)
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"ubyte\.gz: not a readable gzip file"):
        load_dataset("mnist", tmp_path)


def test_real_fashion_mnist(data_root):
    if not (data_root / "FashionMNIST" / "raw").is_dir():
        pytest.skip("no FashionMNIST here")
    train, test = load_dataset("fashion_mnist", data_root)
    assert (train.images.shape, test.images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert train.class_counts().tolist() == [6000] * 10
    # The publisher's first training picture is an ankle boot; 0.2860 is the known pixel mean.
    assert FASHION[int(train.labels[0])] == "Ankle boot"
    assert train.images[:10000].double().mean() / 255 == pytest.approx(0.286, abs=0.002)


# -- CIFAR ---------------------------------------------------------------------------------


def cifar_arrays(classes: int) -> dict[str, np.ndarray]:
    train, test = labelled(6, (32, 32, 3), classes), labelled(4, (32, 32, 3), classes)
    return {
        "x_train": train["x"], "y_train": train["y"].astype(np.uint8),
        "x_test": test["x"], "y_test": test["y"].astype(np.uint8)[:, None],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "classes"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_from_npz(tmp_path, name, classes):
    arrays = cifar_arrays(len(classes))
    save(tmp_path / f"{name}.npz", **arrays)
    train, test = load_dataset(name, tmp_path)
    assert train.images.permute(0, 2, 3, 1).numpy().tolist() == arrays["x_train"].tolist()
    assert test.labels.tolist() == arrays["y_test"].ravel().tolist()
    assert train.classes == classes


def test_cifar_names_are_the_official_ones():
    assert (len(CIFAR100), CIFAR100[0], CIFAR100[49], CIFAR100[99]) == (
        100, "apple", "mountain", "worm",
    )  # fmt: skip
    assert list(CIFAR100) == sorted(set(CIFAR100))
    assert CIFAR10[0] == "airplane"


def test_cifar_from_torchvisions_layout(tmp_path, monkeypatch):
    from fedkd.data.vision import datasets

    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)  # md5 of the real files
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "labels": [3, 8]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}))
    train, test = load_dataset("cifar10", tmp_path)
    assert (len(train), len(test)) == (10, 2)
    assert test.images.numpy().tolist() == pixels.tolist()
    assert train.labels.tolist() == [3, 8] * 5


def test_cifar_says_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"misses .*cifar10\.npz; .*cifar-10-batches-py"):
        load_dataset("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged"):
        load_dataset("cifar10", tmp_path)
    save(tmp_path / "cifar100.npz", x_train=np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="misses y_train, x_test, y_test"):
        load_dataset("cifar100", tmp_path)


def test_svhn_calls_its_ten_zero(tmp_path):
    from scipy.io import savemat

    pixels = RNG.integers(0, 256, (32, 32, 3, 3), dtype=np.uint8)
    for name in ("train", "test"):
        savemat(tmp_path / f"{name}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9]])})
    train, _ = load_dataset("svhn", tmp_path)
    assert train.labels.tolist() == [0, 1, 9]
    assert train.images[1].permute(1, 2, 0).numpy().tolist() == pixels[..., 1].tolist()


def test_a_damaged_svhn_file_is_named(tmp_path):
    for content in (b"", b"no matrix", b"MATLAB 5.0 MAT-file" + b"\0" * 200):
        for name in ("train", "test"):
            (tmp_path / f"{name}_32x32.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"train_32x32\.mat: not a file of SVHN"):
            load_dataset("svhn", tmp_path)


# -- npz -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((6, 5), (1, 6, 5)), ((6, 5, 3), (3, 6, 5)), ((3, 6, 5), (3, 6, 5)), ((6, 5, 1), (1, 6, 5))],
)
def test_npz_layouts(tmp_path, shape, expected):
    arrays = labelled(10, shape)
    save(tmp_path / "own.npz", **arrays)
    train, test = load_dataset("npz", tmp_path, path="own.npz")
    assert (len(train), len(test)) == (8, 2)
    assert test.class_counts().tolist() == [1, 1]
    assert train.shape == expected
    assert train.classes == ("0", "1")
    total = int(train.images.long().sum() + test.images.long().sum())
    assert total == int(arrays["x"].astype(np.int64).sum())


@pytest.mark.parametrize("count", range(1, 14))
def test_a_class_of_two_images_or_more_is_tested(tmp_path, count):
    y = np.array([0] * count + [1] * 10)
    save(tmp_path / "own.npz", x=RNG.integers(0, 256, (len(y), 2, 2), dtype=np.uint8), y=y)
    train, test = load_dataset("npz", tmp_path, path="own.npz")
    few = {1: 0, 2: 1}  # others as ever: a fifth, rounded
    assert test.class_counts().tolist() == [few.get(count, round(0.2 * count)), 2]
    assert len(train) + len(test) == len(y)


def test_no_test_images_are_refused_at_once(tmp_path):
    save(tmp_path / "own.npz", x=np.zeros((3, 2, 2), np.uint8), y=np.arange(3))
    with pytest.raises(ValueError, match=r"own.npz: no test images.* give x_test and y_test, or"):
        load_dataset("npz", tmp_path, path="own.npz")
    for name in "abc":
        picture(tmp_path / "pets" / name / "1.png", (1, 2, 3))
    with pytest.raises(
        ValueError, match=r"pets: no test images.* give train/ and test/, or more images"
    ):
        load_dataset("image_folder", tmp_path, path="pets")


@pytest.mark.parametrize(
    ("option", "value"),
    [("classes", 0), ("size", -1), ("per_class", 0), ("channels", 2), ("noise", float("nan"))],
)
def test_impossible_patterns_are_refused(option, value):
    with pytest.raises(ValueError, match=f"'synthetic': {option} must be"):
        load_dataset("synthetic", **{option: value})


@pytest.mark.parametrize("given", [None, 3, "empty", "one"])
def test_a_data_set_of_ones_own_is_checked(given, monkeypatch):
    train, test = load_dataset("synthetic", per_class=1)
    made = {"empty": (train, test.subset([])), "one": (train,)}.get(given, given)
    monkeypatch.setitem(DATASETS._members, "mine", lambda root: made)
    with pytest.raises(ValueError, match=r"data set 'mine': (expected two|there are no test)"):
        load_dataset("mine")


def test_names_and_roots_of_other_types_are_refused():
    with pytest.raises(ValueError, match="name: expected the name of a data set, got 3"):
        load_dataset(3)
    for root in (5, "~nobody-of-this-name"):
        with pytest.raises(ValueError, match="root: expected a folder of local data"):
            load_dataset("digits", root)


def test_npz_with_its_own_test_set_and_class_names(tmp_path):
    train, test = labelled(4, (2, 2)), labelled(2, (2, 2))
    file = save(
        tmp_path / "own.npz",
        x_train=train["x"], y_train=train["y"], x_test=test["x"], y_test=test["y"],
        classes=np.array(["cat", "dog"]),
    )  # fmt: skip
    loaded = load_dataset("npz", path=str(file))
    assert [len(s) for s in loaded] == [4, 2]
    assert loaded[0].classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((9, 2, 2), np.uint8), "y": np.zeros(9, int)}, "own.npz: only one class, 0"),
        ({"x": np.zeros((2, 4, 4), np.int64), "y": np.arange(2)}, "got int64; convert them"),
        ({"x": np.zeros((2, 4, 4), np.uint8)}, "expected arrays x_train, .* found x"),
        ({"x": np.array([None, {}]), "y": np.arange(2)}, "not an .npz file of plain arrays"),
    ],
)
def test_npz_refuses_what_it_cannot_read(tmp_path, arrays, message):
    save(tmp_path / "own.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_dataset("npz", tmp_path, path="own.npz")


def test_npz_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "no.npz")):
        load_dataset("npz", tmp_path, path="no.npz")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and then nothing")
    for name in ("bare.npy", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name}: not an .npz file"):
            load_dataset("npz", tmp_path, path=name)


# -- image folders -------------------------------------------------------------------------


def test_image_folder_with_train_and_test(tmp_path):
    for part in ("train", "test"):
        picture(tmp_path / "pets" / part / "cat" / "1.png", (255, 0, 0))
        picture(tmp_path / "pets" / part / "dog" / "deep" / "2.PNG", (0, 0, 255))
    (tmp_path / "pets" / "train" / ".cache").mkdir()
    train, test = load_dataset("image_folder", tmp_path, path="pets", size=4)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.shape == (3, 4, 4)
    assert train.images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    grey, _ = load_dataset("image_folder", tmp_path, path="pets", size=8, grey=True)
    assert grey.shape == (1, 8, 8)
    assert int(grey.images[0, 0, 0, 0]) == 76  # 0.299 of red


def test_image_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dataset("image_folder", tmp_path, path="nowhere")
    picture(tmp_path / "cat" / "1.png", (1, 1, 1))
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "2.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"2\.jpg: not a readable 8-bit picture"):
        load_dataset("image_folder", tmp_path)
