import logging
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fedkd.data.datasets import load_dataset
from fedkd.data.folders import read_folder
from fedkd.data.local_shard import _read_private

LOG = "fedkd.data.folders"


def fill(*folders: Path, count: int = 5) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (4, 3), (number * 9, 1, 2)).save(folder / f"{number}.png")


def load(folder: Path):  # type: ignore[no-untyped-def]
    train, test = load_dataset("image_folder", path=folder, size=4)
    return train.classes, len(train), len(test)


def test_hidden_and_foreign_names_are_passed_over_at_every_depth(tmp_path):
    fill(tmp_path / "cat", tmp_path / "dog" / "deep")
    expected = load(tmp_path)
    for litter in (
        ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "$RECYCLE.BIN",
        "cat/.ipynb_checkpoints", "cat/__MACOSX", "cat/@eaDir", "dog/deep/.thumbs/more",
    ):  # fmt: skip
        fill(tmp_path / litter)
    for name in ("._0.png", ".hidden.jpg"):
        (tmp_path / "cat" / name).write_bytes(b"no picture")
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("")
    assert load(tmp_path) == expected == (("cat", "dog"), 8, 2)
    whole, _ = load_dataset("image_folder", path=tmp_path, size=4)
    assert len(_read_private(tmp_path, whole)) == 10


@pytest.mark.parametrize(
    "names", [("bus", "train"), ("test", "train"), ("bus", "test"), ("test", "train", "val"),
              ("bus", "valid"), ("Train", "bus")],
)  # fmt: skip
def test_a_folder_of_pictures_is_a_class_whatever_its_name(tmp_path, names):
    fill(*(tmp_path / name for name in names))
    assert load(tmp_path) == (tuple(sorted(names)), 4 * len(names), len(names))


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Train", "TEST"), ("Training", "Testing"), ("train", "val"),
     ("train", "validation"), ("train", "valid")],
)  # fmt: skip
def test_folders_of_class_folders_are_splits(tmp_path, train, test):
    fill(tmp_path / train / "cat", tmp_path / train / "dog", tmp_path / train / ".cache")
    fill(tmp_path / test / "cat", tmp_path / test / "dog", count=2)
    assert load(tmp_path) == (("cat", "dog"), 10, 4)


def test_what_is_left_out_beside_splits_is_mentioned(tmp_path, caplog):
    for part in ("train", "val", "test"):
        fill(tmp_path / part / "cat", tmp_path / part / "dog", count=2)
    fill(tmp_path / "bird")
    with caplog.at_level(logging.WARNING, LOG):
        assert load(tmp_path) == (("cat", "dog"), 4, 4)
    assert "bird beside the splits are not read" in caplog.text


def test_unlabelled_test_pictures_are_no_test_set(tmp_path, caplog):
    fill(tmp_path / "train" / "cat", tmp_path / "train" / "dog", tmp_path / "test")
    with pytest.raises(ValueError, match="train/ holds folders, but test/ holds pictures"):
        load(tmp_path)
    fill(tmp_path / "val" / "cat", tmp_path / "val" / "dog", count=1)
    with caplog.at_level(logging.WARNING, LOG):
        assert load(tmp_path) == (("cat", "dog"), 10, 2)
    assert "val/ is the test set" in caplog.text
    assert "test beside the splits" in caplog.text


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["train/cat"], "has train/ but no test/"),
        (["bus", "car", "train/steam"], "if train is a class, put its pictures directly"),
        (["val/cat", "dog"], "has val/ but no train/"),
        (["test/cat", "val/cat"], "but no train/"),
        (["train/a", "Training/a", "test/a"], "keep one of them"),
        (["train/a", "train/b", "test/a"], "differ in their classes: b"),
        (["train/a", "test/a", "test/b"], "differ in their classes: b"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "train/cat/ and test/cat/"),
        (["cat/train", "cat/val", "dog"], "would mix the two"),
        (["pictures/cat", "pictures/dog"], "only one class folder, pictures; .*if cat, dog are"),
        (["cat"], "only one class folder, cat; expected one per class$"),
        (["train/a", "test/a"], "only one class folder, a"),
        ([], "no class folders"),
        ([".hidden"], "no class folders"),
    ],
)
def test_what_is_neither_classes_nor_splits_is_refused(tmp_path, made, message):
    fill(*(tmp_path / name for name in made))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_an_empty_class_folder_is_named_with_what_it_holds_instead(tmp_path):
    fill(tmp_path / "cat", tmp_path / "dog" / ".hidden")
    with pytest.raises(ValueError, match=r"dog: no pictures \(.*\.webp\)$"):
        load(tmp_path)
    (tmp_path / "dog" / "1.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dog: no pictures .*; there are 1 \.heic: convert them"):
        load(tmp_path)


def test_pictures_of_other_formats_are_mentioned(tmp_path, caplog):
    fill(tmp_path / "cat", tmp_path / "dog")
    for name in ("a.heic", "b.HEIC", "c.avif", "d.txt"):
        (tmp_path / "cat" / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING, LOG):
        load(tmp_path)
    assert "of other formats are not read (1 .avif, 2 .heic)" in caplog.text


def test_links_lead_neither_round_in_circles_nor_into_other_classes(tmp_path, caplog):
    fill(tmp_path / "in" / "cat", tmp_path / "in" / "dog", tmp_path / "elsewhere")
    (tmp_path / "in" / "cat" / "again").symlink_to(tmp_path / "in")
    with caplog.at_level(logging.WARNING, LOG):
        assert load(tmp_path / "in") == (("cat", "dog"), 8, 2)
    assert "a link to a folder is not followed" in caplog.text
    (tmp_path / "in" / "bird").symlink_to(tmp_path / "elsewhere")
    assert load(tmp_path / "in")[0] == ("bird", "cat", "dog")
    (tmp_path / "in" / "kitten").symlink_to(tmp_path / "in" / "cat")
    with pytest.raises(ValueError, match="cat and kitten are the same folder"):
        load(tmp_path / "in")
    (tmp_path / "in" / "kitten").unlink()
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="loop: a link back to"):
        load(tmp_path / "in")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    import os

    fill(tmp_path / "cat", tmp_path / "dog" / "deep")
    scan = os.scandir

    def refuse(path):  # type: ignore[no-untyped-def]
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"dog/deep: cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_odd_names_of_folders_are_kept_or_refused_in_one_line(tmp_path):
    names = ["[red]", "a, b", "$x^", "<b>", "naïve", "猫", " space "]
    fill(*(tmp_path / name for name in names))
    assert set(load(tmp_path)[0]) == set(names)
    fill(tmp_path / "two\nlines")
    with pytest.raises(ValueError, match=r"two\\nlines: name 0: .*cannot be printed") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "two\nlines")
    (tmp_path / b"\xff\xfe".decode("utf-8", "surrogateescape")).mkdir()
    with pytest.raises(ValueError, match="cannot be printed"):
        load(tmp_path)


def test_accents_are_composed_so_that_a_folder_of_a_mac_fits(tmp_path):
    fill(tmp_path / "train" / "caf\u00e9", tmp_path / "train" / "tea")
    fill(tmp_path / "test" / "cafe\u0301", tmp_path / "test" / "tea")
    assert load(tmp_path)[0] == ("caf\u00e9", "tea")
    fill(tmp_path / "train" / "cafe\u0301")
    with pytest.raises(ValueError, match="two folders"):
        read_folder(tmp_path / "train", 4, False)
