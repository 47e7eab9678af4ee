"""Partitions: how private images are dealt to clients.

A partition takes the labels, the number of clients and a seed, and returns the positions that each
client gets; `partition` calls it and checks what it did. They deal as the partitioners of Flower
Datasets do, draw by draw, from a table of labels alone and for ten thousand clients in a second.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from fedkd.data import PARTITIONS
from fedkd.data.labels import label_numbers
from fedkd.randomness import stream_seed

logger = logging.getLogger(__name__)

Rows = Sequence[Sequence[int] | np.ndarray]
"""Per client, the positions of its examples."""

_MENDS = {
    "dirichlet": "raise alpha, lower min_size, take fewer clients or more images, or deal equal "
    "parts with inner_dirichlet",
    "inner_dirichlet": "raise alpha or take fewer clients",
    "shard": "lower shards_per_client, or take fewer clients or more images",
    "pathological": "change classes_per_client, try mode 'deterministic', or take fewer clients",
    "by_class": "list a class of the data set for each client",
    "sub_shards": "take a multiple of each, fewer clients or more images",
    "continuous": "set strictness between 0 and 1, or take more images",
}
_FEWER = "take fewer clients or more images"


def partition(
    name: str, labels: np.ndarray, clients: int, *, seed: int, **options: Any
) -> list[np.ndarray]:
    """Deal examples to clients.

    The examples are shuffled first, so that nothing depends on the order of a file.

    Args:
        name: A registered partition.
        labels: Class of every example, (N,); for `group` where it comes from.
        clients: Number of parts.
        seed: The run's seed; the same seed gives the same parts.
        **options: Options of the partition.

    Returns:
        Per client the sorted indices of its examples. No example is in two parts; some
        partitions leave a remainder with nobody, which is logged.

    Raises:
        ValueError: unknown name or option, or the request cannot be met (says what to change).
    """
    options = PARTITIONS.check(name, options)
    labels = label_numbers(labels).numpy()
    clients = whole_number(clients, "clients")
    if clients < 1:
        raise ValueError(f"partition {name!r} needs at least one client, got {clients}")
    if len(labels) < clients:
        raise ValueError(
            f"partition {name!r} cannot deal {len(labels)} images to {clients} clients: {_FEWER}"
        )
    derived = stream_seed(seed, "partition")
    order = np.random.default_rng(derived).permutation(len(labels))
    # Some partitioners take labels for row numbers: close the gaps of absent classes.
    classes, codes = np.unique(labels, return_inverse=True)
    codes = codes[order]
    impossible = (
        f"partition {name!r} cannot deal {len(labels)} images of {len(classes)} classes "
        f"to {clients} clients"
    )
    try:
        with np.errstate(all="ignore"):
            rows = PARTITIONS.get(name)(codes, clients, derived, **options)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{impossible} ({error}): {_MENDS.get(name, _FEWER)}") from None
    parts = [np.sort(order[np.asarray(part, dtype=np.int64)]) for part in rows]
    empty = [client for client, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise ValueError(
            f"{impossible} (client {empty[0]} would have none): {_MENDS.get(name, _FEWER)}"
        )
    dealt = np.concatenate(parts)
    if len(np.unique(dealt)) != len(dealt):
        raise RuntimeError(f"partition {name!r} gave an image to two clients")
    if len(dealt) < len(labels):
        logger.warning(
            "partition %r leaves %d of %d images unused",
            name,
            len(labels) - len(dealt),
            len(labels),
        )
    return parts


@PARTITIONS.register("iid")
def iid(labels: np.ndarray, clients: int, seed: int) -> Rows:
    """Equal parts, drawn uniformly."""
    return np.array_split(np.arange(len(labels)), clients)


@PARTITIONS.register("dirichlet")
def dirichlet(
    labels: np.ndarray, clients: int, seed: int, *, alpha: float = 0.5, min_size: int = 10
) -> Rows:
    """Every class is divided among the clients in Dirichlet-distributed shares.

    Args:
        alpha: Small: a client holds few classes and sizes differ; large: close to iid.
        min_size: Images that the smallest client gets at least; the draw is repeated up to ten
            times until it does, and refused then. 0 leaves it at one.

    References:
        Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks",
        ICML 2019, https://arxiv.org/abs/1905.12022
    """
    _check_alpha(alpha)
    if min_size < 0:
        raise ValueError(f"min_size must be at least 0, got {min_size}")
    if min_size * clients > len(labels):
        raise ValueError(f"{clients} times min_size {min_size} is more than {len(labels)}")
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(11):  # as many draws as Flower Datasets takes, and the same ones
        dealt = []
        for rows in members:
            shares = rng.dirichlet(np.full(clients, float(alpha)))
            dealt.append(np.split(rows, (np.cumsum(shares) * len(rows)).astype(int)[:-1]))
        parts = [np.concatenate(pieces) for pieces in zip(*dealt, strict=True)]
        if min(map(len, parts)) >= min_size:
            return parts
    raise ValueError(f"no draw gave every client {min_size} images")


@PARTITIONS.register("inner_dirichlet")
def inner_dirichlet(labels: np.ndarray, clients: int, seed: int, *, alpha: float = 0.5) -> Rows:
    """Parts of equal size, each with its own Dirichlet-distributed class shares.

    Args:
        alpha: Small: a client holds few classes; large: close to iid.

    References:
        Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021,
        https://arxiv.org/abs/2111.04263
    """
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    left = np.array([len(part) for part in np.array_split(labels, clients)])
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    stock = [len(rows) for rows in members]
    shares = rng.dirichlet(np.full(len(members), float(alpha)), size=clients)
    steps = _steps(shares)
    dealt: list[list[int]] = [[] for _ in range(clients)]
    hungry = list(range(clients))
    for _ in range(len(labels)):
        while not left[client := hungry[rng.integers(0, len(hungry))]]:
            hungry.remove(client)
        left[client] -= 1
        while not stock[label := int(steps[client].searchsorted(rng.random(), side="right"))]:
            shares[:, label] = 0
            shares = shares / shares.sum(axis=1, keepdims=True)
            steps = _steps(shares)
        stock[label] -= 1
        dealt[client].append(members[label][stock[label]])
    return dealt


def _steps(shares: np.ndarray) -> np.ndarray:
    """Cumulated shares of the classes, from which a uniform number picks one."""
    if np.isnan(shares).any():
        raise ValueError("alpha is so small that shares cannot be drawn")
    steps = shares.cumsum(axis=1)
    return np.asarray(steps / steps[:, -1:])


@PARTITIONS.register("shard")
def shard(labels: np.ndarray, clients: int, seed: int, *, shards_per_client: int = 2) -> Rows:
    """The images sorted by class are cut into equal shards; a client gets a few at random.

    Args:
        shards_per_client: Shards each client gets; about its number of classes.

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
        Data", AISTATS 2017, https://arxiv.org/abs/1602.05629
    """
    if shards_per_client < 1 or shards_per_client * clients > len(labels):
        raise ValueError(
            f"shards_per_client must be at least 1 and leave an image for each of {clients} times "
            f"{shards_per_client} shards"
        )
    by_class = np.argsort(labels, kind="stable")
    size = len(labels) // (shards_per_client * clients)
    shards = by_class[: len(labels) // size * size].reshape(-1, size)
    chosen = np.random.default_rng(seed).permutation(len(shards))[: shards_per_client * clients]
    return list(shards[chosen].reshape(clients, -1))


@PARTITIONS.register("group")
def group(labels: np.ndarray, clients: int, seed: int) -> Rows:
    """Each client has the images of one origin: a speaker, a hospital, a camera.

    Origins are the data set's `groups` (npz: option `groups`), in their order; if there are more
    of them than clients, they are dealt in turn.
    """
    origins = labels.max() + 1
    if origins < clients:
        raise ValueError(f"there are {origins} groups")
    return [np.flatnonzero(labels % clients == client) for client in range(clients)]


@PARTITIONS.register("pathological")
def pathological(
    labels: np.ndarray,
    clients: int,
    seed: int,
    *,
    classes_per_client: int = 2,
    mode: Literal["random", "deterministic", "first-deterministic"] = "deterministic",
) -> Rows:
    """Every client holds exactly so many classes.

    Args:
        classes_per_client: Classes each client holds.
        mode: How classes are chosen; `random` may leave classes (and their images) unused.

    References:
        Li et al., "Federated Learning on Non-IID Data Silos", ICDE 2022,
        https://arxiv.org/abs/2102.02079
    """
    present = len(np.unique(labels))
    if not 1 <= classes_per_client <= present:
        none = "; client 0 would have none" if classes_per_client < 1 else ""
        raise ValueError(
            f"classes_per_client must be 1 to {present}, got {classes_per_client}{none}"
        )
    rng = np.random.default_rng(seed)
    first = np.arange(clients) % present
    if mode == "deterministic":
        held = (first[:, None] + np.arange(classes_per_client)) % present
    elif mode == "random":
        draws = [rng.choice(present, classes_per_client, replace=False) for _ in range(clients)]
        held = np.stack(draws)
    else:
        others = [_with_others(label, classes_per_client, present, rng) for label in first.tolist()]
        held = np.array(others)
    holders = [np.flatnonzero((held == label).any(axis=1)) for label in range(present)]
    dealt: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, those in enumerate(holders):
        rows = np.flatnonzero(labels == label)
        if len(those) > len(rows):
            raise ValueError(f"class {label} has {len(rows)} images for {len(those)} clients")
        for client, part in zip(those, np.array_split(rows, max(len(those), 1)), strict=False):
            dealt[client].append(part)
    return [np.concatenate(parts) for parts in dealt]


@PARTITIONS.register("by_class")
def by_class(
    labels: np.ndarray, clients: int, seed: int, *, classes: Sequence[Sequence[int]]
) -> Rows:
    """Each client holds the classes that are listed for it.

    Args:
        classes: Numbers of each client's classes; those who share a class share its images evenly.
    """
    if len(classes) != clients:
        raise ValueError(f"classes: lists {len(classes)} clients, there are {clients}")
    for numbers in classes:
        for number in numbers:
            if not 0 <= number < len(np.unique(labels)):
                raise ValueError(f"classes: there is no class {number}")
    dealt: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        those = [client for client in range(clients) if label in classes[client]]
        rows = np.flatnonzero(labels == label)
        for client, part in zip(those, np.array_split(rows, max(len(those), 1))):
            dealt[client].append(part)
    return [np.concatenate([np.empty(0, np.int64), *parts]) for parts in dealt]


@PARTITIONS.register("sub_shards")
def sub_shards(
    labels: np.ndarray, clients: int, seed: int, *, each: int = 5, of: str | dict[str, Any] = "iid"
) -> Rows:
    """Owners deal their images to so many clients each, in disjoint equal parts drawn uniformly.

    A client is then one of an owner's sub-teachers: client 0 to `each` - 1 are the first owner's.

    Args:
        each: Clients of an owner.
        of: The partition of the images among the owners, and its options.

    References:
        Li et al., "Practical One-Shot Federated Learning for Cross-Silo Setting" (FedKT), IJCAI
        2021, https://arxiv.org/abs/2010.01017
    """
    if each < 1 or clients % each:
        raise ValueError(f"{clients} clients are no multiple of each ({each})")
    options = {"name": of} if isinstance(of, str) else dict(of)
    name = options.pop("name", None)
    if not isinstance(name, str) or name in ("sub_shards", "group"):
        raise ValueError(f"of: expected another partition by classes, got {of!r}")
    options = PARTITIONS.check(name, options)
    owners = PARTITIONS.get(name)(labels, clients // each, seed, **options)
    rng = np.random.default_rng(stream_seed(seed, "sub-shards"))
    return [
        part
        for owner in owners
        for part in np.array_split(rng.permutation(np.asarray(owner, dtype=np.int64)), each)
    ]


def _with_others(label: int, count: int, present: int, rng: np.random.Generator) -> list[int]:
    """`count` classes: this one, and others drawn until there are enough."""
    held = [label]
    while len(held) < count:
        if (other := int(rng.integers(0, present))) not in held:
            held.append(other)
    return held


@PARTITIONS.register("continuous")
def continuous(labels: np.ndarray, clients: int, seed: int, *, strictness: float = 0.5) -> Rows:
    """Equal parts between iid (strictness 0) and sorted by class (strictness 1).

    Args:
        strictness: Weight of the class order against Gaussian noise.
    """
    if not 0 <= strictness <= 1:
        raise ValueError(f"strictness is {strictness}")
    # The rank has no ties: sorting by labels alone would leave their order to the processor.
    rank = np.empty(len(labels), np.float32)
    rank[np.argsort(labels, kind="stable")] = np.arange(len(labels))
    place = (rank - np.mean(rank)) / np.std(rank)
    noise = np.random.default_rng(seed).normal(loc=0, scale=1, size=len(labels))
    return np.array_split(np.argsort(strictness * place + (1 - strictness) * noise), clients)


@PARTITIONS.register("linear")
def linear(labels: np.ndarray, clients: int, seed: int) -> Rows:
    """Same class mix, sizes grow like 1, 2, 3, ..."""
    return _growing(len(labels), clients, lambda number: number)


@PARTITIONS.register("square")
def square(labels: np.ndarray, clients: int, seed: int) -> Rows:
    """Same class mix, sizes grow like 1, 4, 9, ..."""
    return _growing(len(labels), clients, np.square)


@PARTITIONS.register("exponential")
def exponential(labels: np.ndarray, clients: int, seed: int) -> Rows:
    """Same class mix, sizes grow like e, e^2, e^3, ...: for a handful of clients."""
    return _growing(len(labels), clients, np.exp)


def whole_number(value: Any, what: str, least: int | None = None) -> int:
    """`value` as an int. Raises `ValueError` for other types, and below `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what}: expected a whole number, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{what}: expected at least {least}, got {number}")
    return number


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, got {alpha}")


def _growing(total: int, clients: int, size: Callable[[np.ndarray], np.ndarray]) -> Rows:
    """Parts whose sizes are proportional to `size(1)`, `size(2)`, ...; the last has the rest."""
    units = size(np.linspace(1, clients, clients))
    sizes = (units / units.sum() * total).astype(np.int64)
    if not (sizes >= 1).all():
        raise ValueError("some clients would have none")
    return np.split(np.arange(total), np.cumsum(sizes)[:-1])
