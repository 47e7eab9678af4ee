import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.data.splits import FederatedData, federate, overlaps
from fedkd.data.transfer import conform


@pytest.fixture(scope="module")
def pair() -> tuple[ImageSet, ImageSet]:
    return load_dataset("synthetic", classes=4, per_class=100, size=8)


@pytest.fixture(scope="module")
def split(pair):
    return partial(federate, *pair, clients=4, partition="iid", transfer_size=80, seed=1)


def private(data: FederatedData) -> list[int]:
    return sorted(np.concatenate([*data.shard_rows, *data.holdout_rows]).tolist())


@pytest.mark.smoke
def test_sets_have_the_asked_sizes_and_share_nothing(split):
    data = split(private_size=200, validation_size=30, holdout=0.1, test_size=50)
    assert len(data.transfer) == 80
    assert len(data.validation) == 30
    assert len(data.test) == 50
    assert data.num_clients == 4
    assert [len(data.shard(i)) for i in range(4)] == [45] * 4
    assert [len(data.holdout(i)) for i in range(4)] == [5] * 4
    assert len(set(private(data))) == 200
    assert set(overlaps(data).values()) == {0}
    assert data.class_counts().sum() == 180
    assert data.class_counts()[2].tolist() == data.shard(2).class_counts().tolist()


def test_without_a_private_size_clients_share_all_that_is_left(split):
    assert len(private(split())) == 320


@pytest.mark.smoke
def test_the_same_seed_gives_the_same_split(split):
    first, again, other = split(holdout=0.2), split(holdout=0.2), split(holdout=0.2, seed=2)
    assert first.transfer.fingerprint == again.transfer.fingerprint
    assert first.transfer.fingerprint != other.transfer.fingerprint
    for client in range(4):
        assert first.shard(client).fingerprint() == again.shard(client).fingerprint()
        assert first.holdout(client).fingerprint() == again.holdout(client).fingerprint()


def test_a_new_set_does_not_move_the_transfer_set(split):
    small, large = split(transfer_size=40), split(validation_size=30, holdout=0.3)
    assert small.transfer.images.images.equal(large.transfer.images.images[:40])


def test_a_holdout_leaves_something_to_train_on(split):
    data = split(private_size=8, holdout=0.9)
    assert [len(data.shard(i)) for i in range(4)] == [1] * 4
    assert [len(data.holdout(i)) for i in range(4)] == [1] * 4
    lonely = split(private_size=4, holdout=0.5)
    assert [len(lonely.holdout(i)) for i in range(4)] == [0] * 4


def test_labels_of_the_transfer_set_stay_hidden(split):
    hidden, shown = split(), split(transfer_labelled=True)
    assert not hidden.transfer.labelled
    assert hidden.transfer.images.labels is None
    assert shown.transfer.labelled
    assert hidden.transfer.true_labels is not None
    assert hidden.transfer.true_labels.equal(shown.transfer.images.labels)


def test_statistics_come_from_the_transfer_images_alone(pair, split):
    data = split()
    assert (data.mean, data.std) == data.transfer.images.statistics()
    train, test = pair
    rows = torch.tensor(private(data))
    darker = train.images.clone()
    darker[rows] = 0
    changed = federate(
        replace(train, images=darker), test,
        clients=4, partition="iid", transfer_size=80, seed=1,
    )  # fmt: skip
    assert changed.mean == data.mean


def test_transfer_images_of_another_data_set(split):
    digits, _ = load_dataset("digits")
    data = split(transfer_images=conform(digits, (3, 12, 12)), transfer_size=1000)
    assert data.transfer.images.shape == (1, 8, 8)
    assert len(data.transfer) == 1000
    assert data.transfer.true_labels is None
    assert data.transfer.images.classes == data.classes
    assert len(private(data)) == 400  # the training set is left to the clients


def test_other_images_of_the_same_classes_keep_their_labels(pair, split):
    _, test = pair
    data = split(transfer_images=test, transfer_labelled=True)
    assert data.transfer.labelled
    assert data.transfer.true_labels is not None


def test_duplicates_are_counted_and_logged(pair, split, caplog):
    train, _ = pair
    data = split()
    twin = train.images[torch.from_numpy(data.shard_rows[0][:3])]
    test = replace(data.test, images=torch.cat([twin, data.test.images[3:]]))
    with caplog.at_level(logging.WARNING, "fedkd.data.splits"):
        found = overlaps(replace(data, test=test))
    assert found["private/test"] == 3
    assert found["transfer/test"] == 0
    assert "private/test: 3" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"private_size": 300, "validation_size": 30},
            "has 400 images, but 80 transfer [+] 30 validation [+] 300 private = 410",
        ),
        ({"transfer_size": 398}, "398 transfer [+] 4 private = 402"),
        ({"clients": 0}, "needs at least one client, got 0"),
        ({"clients": 2.5}, "clients: expected a whole number, got 2.5"),
        ({"transfer_size": 0}, "transfer_size: expected at least 1, got 0"),
        ({"transfer_size": float("nan")}, "transfer_size: expected a whole number, got nan"),
        ({"transfer_size": 10**9}, "has 400 images, but 1000000000 transfer"),
        ({"private_size": -1}, "private_size: expected at least 1"),
        ({"validation_size": -1}, "validation_size: expected at least 0"),
        ({"test_size": 0}, "test_size: expected at least 1"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"holdout": float("nan")}, "holdout must be at least 0 and less than 1, got nan"),
        ({"holdout": "0.1"}, "holdout: expected a number, got '0.1'"),
        ({"partition": 3}, "partition: expected a name of"),
        ({"partition_options": [1]}, r"partition_options: expected a dictionary .*got \[1\]"),
        ({"transfer_images": 5}, "transfer_images: expected an ImageSet, a map-style .*, got int"),
        ({"test_size": 1000}, "1000 test images are asked for, but there are 200"),
        ({"holdout": 1.0}, "holdout must be at least 0 and less than 1"),
        ({"private_size": 3}, "cannot deal 3 images to 4 clients"),
        ({"partition_options": {"alpha": 1}}, "has no option 'alpha'"),
    ],
)
def test_an_impossible_split_names_the_numbers(split, options, message):
    with pytest.raises(ValueError, match=message):
        split(**options)


def test_foreign_labels_and_unfit_sets_are_refused(pair, split):
    train, test = pair
    digits, _ = load_dataset("digits")
    with pytest.raises(ValueError, match="set transfer_labelled to false"):
        split(transfer_images=digits, transfer_labelled=True)
    with pytest.raises(ValueError, match="5 transfer images are asked for, but there are 3"):
        split(transfer_images=digits.subset(torch.arange(3)), transfer_size=5)
    options = {"clients": 2, "partition": "iid", "transfer_size": 5, "seed": 0}
    with pytest.raises(ValueError, match="need labels"):
        federate(train.unlabelled(), test, **options)
    with pytest.raises(ValueError, match="different classes"):
        federate(train, digits, **options)
    with pytest.raises(ValueError, match="test images are"):
        federate(train, conform(test, (3, 8, 8)), **options)


def test_sets_that_cannot_teach_or_judge_are_refused(pair, caplog):
    train, test = pair
    options = {"clients": 2, "partition": "iid", "transfer_size": 5, "seed": 0}
    with pytest.raises(ValueError, match="no test images: the student cannot be judged; give"):
        federate(train, test.subset(torch.tensor([], dtype=torch.int64)), **options)
    with pytest.raises(
        ValueError, match=r"train: expected an ImageSet, got a tuple of them; load_dataset"
    ):
        federate(pair, test, **options)
    with pytest.raises(
        ValueError, match="test: expected an ImageSet or another data set, got NoneType"
    ):
        federate(train, None, **options)
    one = replace(train, labels=torch.zeros(len(train)).long(), classes=("only",))
    with pytest.raises(ValueError, match="at least two classes to tell apart, found only"):
        federate(one, replace(test, labels=test.labels * 0, classes=("only",)), **options)
    back = tuple(reversed(test.classes))
    with pytest.raises(ValueError, match="different classes: their order differs"):
        federate(train, replace(test, classes=back), **options)
    with caplog.at_level(logging.WARNING, "fedkd.data.splits"):
        federate(replace(train, labels=train.labels % 3), test, **options)
    assert "test images of pattern 3, but no training images" in caplog.text


def test_names_in_a_list_are_the_same_classes_and_whole_numbers_are_taken(pair):
    train, test = pair
    listed = ImageSet(train.images, train.labels, list(train.classes))
    data = federate(
        listed, test, clients=np.int64(2), partition="iid", transfer_size=np.uint8(10), seed=0
    )
    assert data.num_clients == 2
    assert len(data.transfer) == 10


def test_there_is_no_client_minus_one(split):
    with pytest.raises(ValueError, match="there is no client -1: clients are 0 to 3"):
        split().shard(-1)


def test_conform_repeats_greys_and_resizes():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    colour = ImageSet(red.expand(2, 3, 6, 4), None, ("a",))
    grey = conform(colour, (1, 3, 5))
    assert grey.images.shape == (2, 1, 3, 5)
    assert grey.images.unique().tolist() == [76]
    back = conform(grey, (3, 3, 5))
    assert back.images[:, 0].equal(back.images[:, 2])
    assert conform(back, (3, 3, 5)) is back
    with pytest.raises(ValueError, match="1 or 3 channels only"):
        conform(back, (4, 3, 5))
