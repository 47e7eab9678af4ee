"""Wrong labels as data: rates, maps, whose they are, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.data.datasets import CIFAR10, CIFAR100, DIGITS, load_dataset
from fedkd.data.images import ImageSet
from fedkd.data.label_noise import LabelNoise, with_label_noise
from fedkd.data.splits import FederatedData, federate


def blank(labels: list[int] | torch.Tensor, classes: tuple[str, ...]) -> ImageSet:
    truth = torch.as_tensor(labels)
    pixels = torch.randint(256, (len(truth), 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels.to(torch.uint8), truth, classes)


def given(images: ImageSet, noise: LabelNoise, *, seed: int = 0, parts: int = 1) -> ImageSet:
    return with_label_noise(images, np.array_split(np.arange(len(images)), parts), noise, seed=seed)


TEN = blank(torch.arange(10).repeat(1000), DIGITS)


def test_a_symmetric_draw_may_hit_the_truth() -> None:
    noisy = given(TEN, LabelNoise("symmetric", 0.6))
    assert noisy.wrong_labels == pytest.approx(0.6 * 9 / 10, abs=0.015)
    assert noisy.labels is not None
    wrong = noisy.labels[noisy.labels != TEN.labels]
    assert wrong.bincount(minlength=10).min() > 450  # uniform over all classes
    assert torch.equal(noisy.true_labels, TEN.labels)


@pytest.mark.parametrize(
    ("classes", "mistaken"),
    [
        (CIFAR10, {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}),
        (DIGITS, {2: 7, 3: 8, 7: 1, 5: 6, 6: 5}),
    ],
)
def test_asymmetric_noise_knows_similar_classes(
    classes: tuple[str, ...], mistaken: dict[int, int]
) -> None:
    noisy = given(blank(range(10), classes), LabelNoise("asymmetric", 1.0))
    assert noisy.labels is not None
    assert noisy.labels.tolist() == [mistaken.get(label, label) for label in range(10)]


def test_asymmetric_noise_stays_within_a_coarse_class() -> None:
    noisy = given(blank(range(100), CIFAR100), LabelNoise("asymmetric", 1.0))
    assert noisy.labels is not None
    assert sorted(noisy.labels.tolist()) == list(range(100))
    names = {CIFAR100[a]: CIFAR100[b] for a, b in enumerate(noisy.labels.tolist())}
    assert (names["beaver"], names["whale"]) == ("dolphin", "beaver")
    assert (names["lawn_mower"], names["tractor"]) == ("rocket", "lawn_mower")


def test_a_pair_is_the_next_class() -> None:
    noisy = given(TEN, LabelNoise("pair", 0.45))
    assert noisy.wrong_labels == 0.45
    assert noisy.labels is not None
    moved = (noisy.labels - TEN.labels) % 10
    assert set(moved.tolist()) == {0, 1}


def test_by_instance_an_image_goes_wrong_its_own_way() -> None:
    noisy = given(TEN, LabelNoise("instance", 0.4))
    assert noisy.wrong_labels == pytest.approx(0.4, abs=0.02)
    # The same picture with the same class goes to the same other class, as pairs and draws do not.
    twins = ImageSet(TEN.images[:1].repeat(400, 1, 1, 1), torch.zeros(400).long(), DIGITS)
    labels = given(twins, LabelNoise("instance", 0.4)).labels
    assert labels is not None
    assert labels.bincount(minlength=10).sort().values[-2:].sum() > 300


@pytest.mark.parametrize("file", ["noise.npz", "noise.npy"])
def test_a_file_is_in_training_order(tmp_path: Path, file: str) -> None:
    images = blank([0, 1, 2, 3], ("a", "b", "c", "d"))
    labels = np.array([3, 1, 2, 0], np.uint8)
    if file.endswith("npz"):
        np.savez(tmp_path / file, worst=labels, other=labels[:2])
    else:
        np.save(tmp_path / file, labels)
    noise = LabelNoise("file", file=tmp_path / file, key="worst" if "npz" in file else None)
    # Only rows that somebody trains on.
    noisy = with_label_noise(images, [np.array([3, 2])], noise, seed=0)
    assert noisy.labels is not None
    assert noisy.labels.tolist() == [0, 1, 2, 0]


def split(noise: LabelNoise | None, *, clients: int = 4, seed: int = 3) -> FederatedData:
    train, test = load_dataset("synthetic", classes=4, per_class=100)
    return federate(
        train,
        test,
        clients=clients,
        partition="iid",
        transfer_size=80,
        transfer_labelled=True,
        validation_size=40,
        holdout=0.2,
        label_noise=noise,
        seed=seed,
    )


@pytest.mark.smoke
def test_only_labels_that_clients_train_on_go_wrong() -> None:
    clean, noisy = split(None), split(LabelNoise("pair", 0.5))
    assert clean.wrong_labels() is None
    assert noisy.wrong_labels() == pytest.approx([0.5] * 4, abs=0.01)
    for client in range(4):
        assert torch.equal(noisy.shard(client).images, clean.shard(client).images)
        assert torch.equal(noisy.shard(client).true_labels, clean.shard(client).labels)
        assert torch.equal(noisy.holdout(client).labels, clean.holdout(client).labels)
    others = (
        (noisy.transfer.images, clean.transfer.images),
        (noisy.validation, clean.validation),
        (noisy.test, clean.test),
    )
    for mine, theirs in others:
        assert torch.equal(mine.labels, theirs.labels)
    assert torch.equal(noisy.transfer.true_labels, clean.transfer.true_labels)
    pooled = noisy.pooled()
    assert pooled.wrong_labels == pytest.approx(0.5, abs=0.01)
    # What clients report of themselves is what they believe.
    assert torch.equal(noisy.class_counts()[1], noisy.shard(1).class_counts())
    assert noisy.shard(1).unlabelled().true_labels is None


def test_the_seed_draws_the_noise() -> None:
    first, again = split(LabelNoise("symmetric", 0.5)), split(LabelNoise("symmetric", 0.5))
    other = split(LabelNoise("symmetric", 0.5), seed=4)
    assert torch.equal(first.source.labels, again.source.labels)
    assert not torch.equal(first.source.labels, other.source.labels)


def test_a_share_of_the_clients_can_have_it() -> None:
    wrong = split(LabelNoise("pair", 0.5, clients=0.5)).wrong_labels()
    assert sorted(wrong) == pytest.approx([0, 0, 0.5, 0.5], abs=0.01)
    assert sum(map(bool, split(LabelNoise("pair", 0.5, clients=0.01)).wrong_labels())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "some", "rate": 0.5}, "kind: expected symmetric, .*got 'some'"),
        ({"kind": "pair"}, "rate: kind 'pair' needs a share from 0 to 1, got None"),
        ({"kind": "pair", "rate": 1.5}, "rate: .*got 1.5"),
        ({"kind": "pair", "rate": 0.5, "file": Path("a")}, "file: kind 'pair' reads no file"),
        ({"kind": "pair", "rate": 0.5, "key": "a"}, "key: kind 'pair' reads no file"),
        ({"kind": "pair", "rate": 0.5, "clients": 0}, "clients: expected a share above 0"),
        ({"kind": "file"}, "file: kind 'file' needs an .npz or .npy"),
        ({"kind": "file", "file": Path("a"), "rate": 0.4}, "rate: kind 'file' has its own"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelNoise(**options)


def test_asymmetric_noise_is_refused_where_no_map_is_known() -> None:
    with pytest.raises(ValueError, match=r"not of pattern 0, pattern 1.*use 'pair'"):
        split(LabelNoise("asymmetric", 0.4))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    images = blank([0, 1, 2, 3], ("a", "b", "c", "d"))
    file = tmp_path / "noise.npz"
    np.savez(file, short=np.arange(3), high=np.array([0, 1, 2, 4]), real=np.zeros(4))
    plain = tmp_path / "noise.npy"
    np.save(plain, np.arange(4))
    cases = [
        (file, None, r"key: expected one of high, real, short in .*noise.npz, got None"),
        (file, "sort", "key: expected one of .*got sort"),
        (file, "short", "3 labels for 4 training images"),
        (file, "high", "high: .*4"),
        (file, "real", "expected whole numbers"),
        (plain, "short", "is one array; leave the key out"),
    ]
    for place, key, message in cases:
        with pytest.raises(ValueError, match=message):
            given(images, LabelNoise("file", file=place, key=key))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.npz"):
        given(images, LabelNoise("file", file=tmp_path / "none.npz"))
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.npy: not an \.npy file"):
        given(images, LabelNoise("file", file=tmp_path / "bad.npy"))


@pytest.mark.slow
def test_the_human_labels_of_cifar_10(data_root: Path) -> None:
    """Shares of wrong labels as Wei et al. publish them (ICLR 2022)."""
    file = data_root / "CIFAR-N" / "human_labels.npz"
    if not file.is_file():
        pytest.skip("no CIFAR-N/human_labels.npz below FEDKD_DATA")
    with np.load(file) as arrays:
        images = blank(torch.from_numpy(arrays["c10_clean"]).long(), CIFAR10)
    shares = {"c10_worst": 0.402, "c10_aggregate": 0.090, "c10_random1": 0.172}
    for key, share in shares.items():
        noisy = given(images, LabelNoise("file", file=file, key=key))
        assert noisy.wrong_labels == pytest.approx(share, abs=0.001)
