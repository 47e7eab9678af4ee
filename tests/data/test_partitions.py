import hashlib
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data import PARTITIONS
from fedkd.data.partitions import partition

LABELS = np.repeat(np.arange(10), 60)
COMPLETE = [
    "iid",
    "sub_shards",
    "dirichlet",
    "inner_dirichlet",
    "pathological",
    "continuous",
    "linear",
    "square",
]
EASY = {
    "dirichlet": {"alpha": 1.0, "min_size": 1},
    "sub_shards": {"each": 1},
    "by_class": {"classes": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9, 0]]},
}


def counts(parts: list[np.ndarray], labels: np.ndarray = LABELS) -> np.ndarray:
    return np.stack([np.bincount(labels[part], minlength=10) for part in parts])


@pytest.mark.parametrize("name", PARTITIONS.names())
def test_the_seed_decides_and_nothing_else(name):
    options = EASY.get(name, {})
    first = partition(name, LABELS, 5, seed=3, **options)
    np.random.default_rng().random()
    again = partition(name, LABELS, 5, seed=3, **options)
    other = partition(name, LABELS, 5, seed=4, **options)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = name != "group"  # whose images are whose is no chance
    assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True)) is not drawn


@pytest.mark.parametrize("name", COMPLETE)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    clients=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(16, 40), min_size=2, max_size=5),
)
def test_parts_are_disjoint_sorted_and_complete(name, clients, seed, sizes):
    labels = np.repeat(np.arange(len(sizes)) * 2, sizes)  # with absent classes in between
    options = dict(EASY.get(name, {}))
    if name == "pathological":
        options["classes_per_client"] = len(sizes)
    if name in ("dirichlet", "inner_dirichlet"):
        options["alpha"] = 5.0
    parts = partition(name, labels, clients, seed=seed, **options)
    assert len(parts) == clients
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


def test_iid_parts_are_equal_and_mixed_even_if_the_file_is_sorted():
    table = counts(partition("iid", LABELS, 4, seed=0))
    assert table.sum(1).tolist() == [150] * 4
    assert table.min() > 3


def test_a_small_alpha_concentrates_classes():
    def largest_share(alpha: float) -> float:
        table = counts(partition("dirichlet", LABELS, 5, seed=0, alpha=alpha, min_size=5))
        return float((table.max(1) / table.sum(1)).mean())

    assert largest_share(0.2) > largest_share(100.0) + 0.1


def test_min_size_is_kept():
    sizes = [len(p) for p in partition("dirichlet", LABELS, 5, seed=1, alpha=0.5, min_size=40)]
    assert min(sizes) >= 40


def test_inner_dirichlet_parts_are_equal_in_size():
    assert [len(p) for p in partition("inner_dirichlet", LABELS, 7, seed=0, alpha=1.0)] == [
        86, 86, 86, 86, 86, 85, 85,
    ]  # fmt: skip


def test_pathological_clients_hold_so_many_classes():
    table = counts(partition("pathological", LABELS, 10, seed=0, classes_per_client=3))
    assert ((table > 0).sum(1) == 3).all()


def test_two_shards_hold_few_classes():
    table = counts(partition("shard", LABELS, 10, seed=0, shards_per_client=2))
    assert (table.sum(1) == 60).all()
    assert ((table > 0).sum(1) <= 4).all()


def test_strictness_goes_from_mixed_to_sorted():
    mixed = counts(partition("continuous", LABELS, 5, seed=0, strictness=0.0))
    strict = counts(partition("continuous", LABELS, 5, seed=0, strictness=1.0))
    assert (mixed > 0).sum() > 45
    assert ((strict > 0).sum(1) == 2).all()


@pytest.mark.parametrize("name", ["linear", "square", "exponential"])
def test_sizes_grow_with_the_number_of_the_client(name):
    sizes = [len(part) for part in partition(name, LABELS, 5, seed=0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.5 * sizes[-2] or name == "linear"


def test_images_left_over_are_logged(caplog):
    with caplog.at_level(logging.WARNING, "fedkd.data.partitions"):
        parts = partition("pathological", LABELS, 3, seed=0, classes_per_client=2)
    assert sum(map(len, parts)) == 240
    assert "leaves 360 of 600 images unused" in caplog.text


@pytest.mark.parametrize(
    ("name", "clients", "options", "message"),
    [
        ("dirichlet", 8, {"min_size": 100}, "8 times min_size 100 .*: raise alpha, lower min_size"),
        ("dirichlet", 10, {"alpha": 0.02, "min_size": 50}, "to 10 clients .*lower min_size"),
        ("dirichlet", 5, {"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ("pathological", 5, {"classes_per_client": 11}, "change classes_per_client"),
        ("pathological", 5, {"classes_per_client": 0}, "client 0 would have none"),
        ("shard", 400, {"shards_per_client": 2}, "lower shards_per_client"),
        ("pathological", 2, {"classes_per_client": -1, "mode": "random"}, "must be 1 to 10, got"),
        ("dirichlet", 5, {"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ("dirichlet", 5, {"min_size": -1}, "min_size must be at least 0"),
        ("inner_dirichlet", 5, {"alpha": 1e-9}, "alpha is so small that shares cannot be drawn"),
        ("continuous", 5, {"strictness": float("nan")}, "set strictness between 0 and 1"),
        ("linear", 500, {}, "some clients would have none"),
        ("iid", 1.5, {}, "clients: expected a whole number, got 1.5"),
        ("shard", 4, {"shards_per_client": 0}, "lower shards_per_client"),
        ("exponential", 50, {}, "take fewer clients or more images"),
        ("continuous", 5, {"strictness": 2.0}, "set strictness between 0 and 1"),
        ("iid", 601, {}, "cannot deal 600 images to 601 clients"),
        ("iid", 0, {}, "at least one client"),
        ("sub_shards", 7, {"each": 3}, "7 clients are no multiple of each .*: take a multiple"),
        ("sub_shards", 6, {"each": 3, "of": "group"}, "of: expected another partition by classes"),
        ("sub_shards", 6, {"each": 3, "of": {"alpha": 1}}, "of: expected another partition"),
        ("sub_shards", 6, {"each": 3, "of": "idd"}, "unknown partition 'idd'; did you mean"),
    ],
)
def test_an_impossible_request_says_what_to_change(name, clients, options, message):
    with pytest.raises(ValueError, match=message):
        partition(name, LABELS, clients, seed=0, **options)


def test_sub_shards_are_equal_parts_of_what_their_owner_holds():
    of = {"name": "dirichlet", "alpha": 0.3, "min_size": 5}
    parts = partition("sub_shards", LABELS, 12, seed=1, each=3, of=of)
    owners = partition("dirichlet", LABELS, 4, seed=1, alpha=0.3, min_size=5)
    for number, owner in enumerate(owners):
        mine = parts[3 * number : 3 * number + 3]
        assert np.array_equal(np.sort(np.concatenate(mine)), owner)
        assert np.ptp([len(part) for part in mine]) <= 1


def test_names_and_options_are_checked():
    with pytest.raises(ValueError, match="'dirichlett'; did you mean 'dirichlet'"):
        partition("dirichlett", LABELS, 2, seed=0)
    with pytest.raises(ValueError, match="has no option 'alfa'"):
        partition("dirichlet", LABELS, 2, seed=0, alfa=1.0)
    with pytest.raises(ValueError, match="mode: Input should be 'random'"):
        partition("pathological", LABELS, 2, seed=0, mode="chaotic")


DRAWN = np.random.default_rng(1).integers(0, 7, 997)


@pytest.mark.parametrize(
    ("name", "options", "known"),
    [
        ("iid", {}, "6368df4b8e70"),
        ("dirichlet", {"alpha": 0.3, "min_size": 5}, "a1ca8867b5d7"),
        ("inner_dirichlet", {"alpha": 0.1}, "776a2c0ca007"),
        ("shard", {"shards_per_client": 3}, "2d030ea42bc1"),
        ("pathological", {"mode": "random"}, "b15bc92c78de"),
        ("pathological", {"mode": "deterministic"}, "36ac544021c4"),
        ("pathological", {"mode": "first-deterministic"}, "5ee91f93b52a"),
        ("continuous", {"strictness": 0.8}, "825a4bb01ce1"),
        ("linear", {}, "070dd4e46912"),
    ],
)
def test_the_parts_are_those_of_flower_datasets(name, options, known):
    # Digests of what the partitioners of Flower Datasets 0.6.1 deal to 17 clients by seed 7.
    defaults = {"classes_per_client": 2} if name == "pathological" else {}
    parts = PARTITIONS.get(name)(DRAWN, 17, 7, **defaults, **options)
    data = b"|".join(np.sort(np.asarray(part, np.int64)).tobytes() for part in parts)
    assert hashlib.sha256(data).hexdigest()[:12] == known


@pytest.mark.parametrize(
    ("name", "options"),
    [("inner_dirichlet", {"alpha": 0.1}), ("shard", {}), ("pathological", {}), ("continuous", {})],
)
def test_thousands_of_clients_get_a_few_images_each(name, options):
    parts = partition(name, DRAWN.repeat(5), 1000, seed=0, **options)
    assert {len(part) for part in parts} <= {3, 4, 5, 6, 7}


def test_dirichlet_for_thousands_names_what_can_deal_to_them():
    for options in ({}, {"min_size": 0}, {"min_size": 1}):
        with pytest.raises(ValueError, match="or deal equal parts with inner_dirichlet"):
            partition("dirichlet", DRAWN, 400, seed=0, **options)


def test_by_class_deals_what_is_listed_and_shares_evenly():
    table = counts(partition("by_class", LABELS, 3, seed=0, classes=[[0, 1], [1, 9], [1]]))
    assert table[:, 0].tolist() == [60, 0, 0]
    assert table[:, 1].tolist() == [20, 20, 20]
    assert table[:, 2:9].sum() == 0
    assert table[:, 9].tolist() == [0, 60, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [([[0]], "lists 1 clients, there are 2"), ([[0], [10]], "there is no class 10"),
     ([[0], []], "client 1 would have none")],
)  # fmt: skip
def test_by_class_refuses_what_cannot_be_dealt(classes, message):
    with pytest.raises(ValueError, match=message):
        partition("by_class", LABELS, 2, seed=0, classes=classes)
