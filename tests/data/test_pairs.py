"""Transfer sets of pairs: two sides of the same samples, and who sees which."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.data.pairs import Side, alike, federate_pairs, pair_rows, read_pairs
from fedkd.data.partitions import partition
from fedkd.data.splits import FederatedData, federate, same_transfer

CLASSES = ("a", "b", "c")


def images(count: int, size: int, seed: int, channels: int = 1) -> ImageSet:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, channels, size, size), generator=draw, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 3, CLASSES)


def sides(**changes: Any) -> dict[str, Side]:
    audio = Side(images(90, 8, 0), images(30, 8, 1), (0, 1), "iid")
    picture = Side(images(60, 6, 2, 3), images(21, 6, 3, 3), (2,), "iid")
    return {"audio": replace(audio, **changes), "image": picture}


def split(given: dict[str, Side] | None = None, **more: Any) -> FederatedData:
    options: dict[str, Any] = {
        "student": ("image",), "by": "class", "clients": 3, "transfer_size": 24,
        "validation_size": 6, "holdout": 0.1, "seed": 5,
    }  # fmt: skip
    return federate_pairs(given or sides(), **{**options, **more})


def test_every_client_has_its_own_side_and_pairs_are_of_one_class() -> None:
    data = split()
    assert [data.of(client).modality for client in range(3)] == ["audio", "audio", "image"]
    assert data.modality == "image"
    assert data.shard(0).shape == (1, 8, 8)
    assert data.shard(2).shape == (3, 6, 6)
    audio, image = data.sides["audio"], data.sides["image"]
    for name in ("transfer", "validation", "test"):
        ours, theirs = getattr(audio, name), getattr(image, name)
        labels = [s.true_labels if name == "transfer" else s.labels for s in (ours, theirs)]
        assert (labels[0] == labels[1]).all(), name
    assert len(audio.transfer) == len(image.transfer) == 24
    assert (audio.mean, audio.std) == audio.transfer.images.statistics()
    # Every training image is private, held out, in the transfer set or for validation, once.
    for name, total, owners in (("audio", 90, (0, 1)), ("image", 60, (2,))):
        private = sum(len(data.held_by(client)) for client in owners)
        assert private + 24 + 6 == total, name
    assert data.class_counts().sum(1).tolist() == [len(data.shard(n)) for n in range(3)]
    assert len(data.pooled()) == len(data.shard(2))


def test_the_students_side_is_dealt_as_without_pairs() -> None:
    data, side = split(), sides()["image"]
    alone = federate(
        side.train, side.test, clients=1, partition="iid", transfer_size=24, validation_size=6,
        holdout=0.1, seed=5,
    )  # fmt: skip
    assert data.transfer.fingerprint == alone.transfer.fingerprint
    assert data.validation.fingerprint() == alone.validation.fingerprint()


def test_by_index_takes_the_same_places_of_both() -> None:
    audio, image = sides()["audio"].train, sides()["image"].train
    rows = pair_rows({"audio": audio, "image": image}, "image", "index", 24, 5)
    assert (rows["audio"] == rows["image"]).all()
    assert rows["audio"].max() < 60
    with pytest.raises(ValueError, match="61 pairs are asked for, but there are 60"):
        pair_rows({"audio": audio, "image": image}, "audio", "index", 61, 5)


def test_pairs_by_class_are_drawn_from_the_seed_and_never_twice() -> None:
    both = {name: side.train for name, side in sides().items()}
    rows = pair_rows(both, "image", "class", 40, 5)
    assert len(rows["audio"].unique()) == 40
    assert (both["audio"].labels[rows["audio"]] == both["image"].labels[rows["image"]]).all()
    assert not (rows["audio"] == pair_rows(both, "image", "class", 40, 6)["audio"]).all()
    few = {**both, "audio": both["audio"].subset(torch.arange(30))}
    with pytest.raises(ValueError, match=r"audio: 1\d images of class a .* but there are 10"):
        pair_rows(few, "image", "class", 40, 5)


def test_a_class_without_test_images_is_named() -> None:
    picture = images(9, 4, 0)
    two = picture.subset((picture.labels != 1).nonzero().flatten())
    with pytest.raises(ValueError, match="audio: test: there is no image of class b"):
        alike(picture, two, "audio: test")


def test_sides_have_the_same_classes() -> None:
    other = replace(sides()["audio"].train, classes=("a", "b", "d"))
    test = replace(sides()["audio"].test, classes=("a", "b", "d"))
    with pytest.raises(ValueError, match="different classes: c, d are in one of them only"):
        split(sides(train=other, test=test))


def test_a_student_of_both_has_them_as_channels() -> None:
    data = split(student=("image", "audio"))
    assert data.modality == "image+audio"
    assert data.transfer.images.shape == data.test.shape == (4, 8, 8)
    assert len(data.mean) == 4
    assert torch.equal(
        data.transfer.images.images[:, 3:], data.sides["audio"].transfer.images.images
    )
    assert len(data.pooled()) == 0


def test_the_fingerprint_is_of_both_sides() -> None:
    data = split()
    assert data.fingerprint.startswith("audio=")
    assert ",image=" in data.fingerprint
    other = split(sides(train=images(90, 8, 9)))
    assert other.transfer.fingerprint == data.transfer.fingerprint
    assert other.fingerprint != data.fingerprint
    mine = f"audio={data.sides['audio'].transfer.fingerprint}"
    assert same_transfer(mine, data.fingerprint)
    assert not same_transfer(mine, other.fingerprint)
    assert not same_transfer("audio=0", data.fingerprint)


def test_pairs_of_their_own_come_from_a_file(tmp_path: Path) -> None:
    pixels = np.arange(30 * 64, dtype=np.uint8).reshape(30, 8, 8)
    colour = np.zeros((30, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "pairs.npz", x_audio=pixels, x_image=colour)
    known = {"audio": CLASSES, "image": CLASSES}
    found = read_pairs(tmp_path / "pairs.npz", known)
    data = split(transfer_images=found, transfer_size=20)
    assert data.transfer.true_labels is None
    assert len(data.held_by(0)) + len(data.held_by(1)) == 90 - 6
    first = data.sides["audio"].transfer.images.images[0, 0]
    assert any(np.array_equal(first.numpy(), picture) for picture in pixels)
    for arrays, message in (
        ({"x_audio": pixels}, "misses x_image; found x_audio"),
        ({"x_audio": pixels[:9], "x_image": colour}, "found 9 of audio, 30 of image"),
    ):
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_pairs(tmp_path / "wrong.npz", known)
    with pytest.raises(FileNotFoundError, match=r"x_audio=\.\.\., x_image=\.\.\."):
        read_pairs(tmp_path / "none.npz", known)


def test_an_npz_has_sides_and_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sound, picture = (rng.integers(0, 256, (40, n, n), np.uint8) for n in (8, 6))
    who = np.array([["ann", "bob", "cem", "dan"][n % 4] for n in range(40)])
    np.savez(
        tmp_path / "a.npz", x_audio=sound, x_image=picture, y=np.arange(40) // 10 % 2, speaker=who
    )
    train, test = load_dataset("npz", tmp_path, path="a.npz", side="audio", groups="speaker")
    assert train.shape == (1, 8, 8)
    other, _ = load_dataset("npz", tmp_path, path="a.npz", side="image")
    assert other.shape == (1, 6, 6)
    assert torch.equal(other.labels, train.labels)
    assert other.groups is None
    data = federate(
        train, test, clients=4, partition="group", transfer_size=4, transfer_labelled=False, seed=0
    )
    for client in range(4):
        groups = data.shard(client).groups
        assert groups is not None
        assert set(groups.tolist()) == {client}
    with pytest.raises(ValueError, match="there is no array x_smell"):
        load_dataset("npz", tmp_path, path="a.npz", side="smell")
    with pytest.raises(ValueError, match="there is no array 'town'"):
        load_dataset("npz", tmp_path, path="a.npz", side="audio", groups="town")
    with pytest.raises(ValueError, match="do not say where they come from"):
        federate(other, other, clients=4, partition="group", transfer_size=4, seed=0)
    with pytest.raises(ValueError, match="there are 4 groups"):
        federate(train, test, clients=5, partition="group", transfer_size=4, seed=0)


def test_groups_are_dealt_in_turn() -> None:
    parts = partition("group", np.array([7, 7, 3, 5, 3]), 2, seed=0)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 4], [3]]
