"""The split of one data set into private shards, transfer set, validation and test set."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.data.domains import Domains, Shift
from fedkd.data.heads import Heads
from fedkd.data.hugging_face import dealt_by
from fedkd.data.images import ImageSet, as_image_set
from fedkd.data.label_noise import LabelNoise, with_label_noise
from fedkd.data.labels import listed
from fedkd.data.partitions import partition as deal
from fedkd.data.partitions import whole_number
from fedkd.data.transfer import TransferSet, conform
from fedkd.randomness import stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FederatedData:
    """Who holds what: the same on every machine that has the same images.

    Attributes:
        source: The training images; shards are rows of it, gathered when asked for.
        shard_rows: Per client the rows it trains on.
        holdout_rows: Per client the rows it keeps for its own validation.
        transfer: The common transfer set.
        validation: Labelled images of the server; may be empty.
        test: Public test images.
        mean: Per channel, of the transfer images scaled to [0, 1]: they are public, so the
            normalisation tells nothing about private images and every machine has it.
        std: Likewise.
        modality: What the student sees here, where clients see something else; else empty.
        sides: Modality -> what its clients see of the same samples; empty where there is one.
        seen_by: Each client's modality; empty where there is one.
        domains: Of clients and of everything else; None where all are of one.
        source_tests: The test images in each source domain.
        heads: Of a student with several: `classes` are then those of all of them, and what clients
            hold is labelled so, each by its own head; public images keep the data set's classes.
    """

    source: ImageSet
    shard_rows: tuple[np.ndarray, ...]
    holdout_rows: tuple[np.ndarray, ...]
    transfer: TransferSet
    validation: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    modality: str = ""
    sides: Mapping[str, FederatedData] = field(default_factory=dict)
    seen_by: tuple[str, ...] = ()
    domains: Domains | None = None
    source_tests: tuple[ImageSet, ...] = ()
    heads: Heads | None = None

    def with_heads(self, heads: Heads, dealt: Sequence[str]) -> FederatedData:
        """The same, where each client knows one head.

        Args:
            heads: Over the classes at hand.
            dealt: Name of each client's.
        """
        first = heads.labelled(self.source, heads.names[0])
        assert first.labels is not None
        labels = first.labels.clone()
        true = None if first.true_labels is None else first.true_labels.clone()
        for head in heads.names[1:]:
            here = heads.labelled(self.source, head)
            for client in (c for c, name in enumerate(dealt) if name == head):
                for rows in (self.shard_rows[client], self.holdout_rows[client]):
                    assert here.labels is not None
                    labels[rows] = here.labels[rows]
                    if true is not None and here.true_labels is not None:
                        true[rows] = here.true_labels[rows]
        source = replace(first, labels=labels, true_labels=true)
        return replace(self, source=source, heads=heads)

    def of(self, client: int) -> FederatedData:
        """The data as this client sees them.

        Raises:
            ValueError: there is no such client, or its side is not on this machine.
        """
        if not self.seen_by:
            return self
        seen = self.seen_by[self._known(client)]
        if seen not in self.sides:
            raise ValueError(
                f"client {client} sees {seen!r}, of which this machine has nothing (it has "
                f"{listed(sorted(self.sides))})"
            )
        return self.sides[seen]

    @property
    def fingerprint(self) -> str:
        """Hash of the transfer set; of pairs, that of each side: `audio=...,image=...`."""
        if not self.sides:
            return self.transfer.fingerprint
        found = (f"{name}={side.transfer.fingerprint}" for name, side in self.sides.items())
        return ",".join(sorted(found))

    @property
    def test_fingerprint(self) -> str:
        """Hash of the test images, likewise."""
        if not self.sides:
            return self.test.fingerprint()
        found = (f"{name}={side.test.fingerprint()}" for name, side in self.sides.items())
        return ",".join(sorted(found))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.source.classes

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.shard_rows)

    def shard(self, client: int) -> ImageSet:
        """The labelled images that `client` trains on."""
        side = self.of(client)
        return side.source.subset(side.shard_rows[self._known(client)])

    def shard_size(self, client: int) -> int:
        """How many those are."""
        return len(self.of(client).shard_rows[client])

    def held_by(self, client: int) -> ImageSet:
        """All images of a client, held out or not, in the order of the source."""
        side = self.of(client)
        rows = np.concatenate([side.shard_rows[client], side.holdout_rows[client]])
        return side.source.subset(np.sort(rows))

    def pooled(self) -> ImageSet:
        """All clients' private images in one place, as no federation has them.

        Of several modalities, those of the student's own; none if no client has it.
        """
        shards = [self.source.subset(rows) for rows in self.shard_rows]
        labels = torch.cat([shard.labels for shard in shards if shard.labels is not None])
        true = [shard.true_labels for shard in shards if shard.true_labels is not None]
        return ImageSet(
            torch.cat([shard.images for shard in shards]),
            labels,
            self.classes,
            torch.cat(true) if true else None,
        )

    def holdout(self, client: int) -> ImageSet:
        """The labelled images that `client` keeps for its own validation; may be empty."""
        side = self.of(client)
        return side.source.subset(side.holdout_rows[self._known(client)])

    def class_counts(self) -> Tensor:
        """Training images per client and class, int64 (clients, C); without the held-out ones."""
        counts = []
        for client in range(self.num_clients):
            # Of another side that is not here nothing is known, as of other machines' clients.
            side = self.sides.get(self.seen_by[client], self) if self.seen_by else self
            assert side.source.labels is not None
            rows = torch.from_numpy(side.shard_rows[client])
            counts.append(torch.bincount(side.source.labels[rows], minlength=len(self.classes)))
        return torch.stack(counts)

    def wrong_labels(self) -> list[float | None] | None:
        """Share of wrong labels among each client's training images; None without noise."""
        if self.source.true_labels is None:
            return None
        return [self.shard(client).wrong_labels for client in range(self.num_clients)]

    def _known(self, client: int) -> int:
        if not 0 <= client < self.num_clients:
            raise ValueError(
                f"there is no client {client}: clients are 0 to {self.num_clients - 1}"
            )
        return client


def federate(
    train: Any,
    test: Any = None,
    *,
    clients: int | None = None,
    partition: Any = None,
    partition_options: Mapping[str, Any] | None = None,
    transfer_size: int,
    transfer_labelled: bool = False,
    transfer_images: ImageSet | None = None,
    private_size: int | None = None,
    validation_size: int = 0,
    validation_images: ImageSet | None = None,
    holdout: float = 0.0,
    test_size: int | None = None,
    label_noise: LabelNoise | None = None,
    domains: Domains | None = None,
    seed: int,
    holders: Sequence[int] | None = None,
    transfer_rows: Tensor | None = None,
) -> FederatedData:
    """Draw transfer, validation and private images from `train`, and deal the private ones.

    Sets are drawn uniformly, one after the other from what is left, each from its own stream:
    a larger validation set never moves the transfer set, and a smaller transfer set is the
    beginning of a larger one.

    Args:
        train: Labelled images to draw from: an `ImageSet`, or whatever `ImageSet.from_dataset`
            takes; or a `FederatedDataset` of Flower Datasets, whose partitioner counts.
        test: Labelled test images of the same shape and classes, likewise; None: the split `test`
            of a `FederatedDataset`.
        clients: Number of clients; None: as many as the partitioner makes parts.
        partition: Registered partition that deals the private images, or a partitioner of Flower
            Datasets, which deals as it does in Flower.
        partition_options: Its options.
        transfer_size: Images in the transfer set.
        transfer_labelled: Whether the student may use the labels of the transfer set.
        transfer_images: Draw the transfer set from these images instead of `train`; they are
            brought to the shape of `train`.
        private_size: Private images over all clients; None: all that are left.
        validation_size: Labelled images the server holds.
        validation_images: Draw those from these images instead of `train`.
        holdout: Share of every shard that its client keeps for validation, at least one image
            unless it is 0 or the shard has only one.
        test_size: Test images used; None: all.
        label_noise: How labels that clients train on go wrong; those held out stay true.
        domains: Those of the clients, and the target, of which everything else is.
        seed: The run's seed.
        holders: The clients that get private images; None: all.
        transfer_rows: The rows of `train` that are the transfer set, already drawn; None: they are
            drawn here.

    Raises:
        ValueError: wrong types, too few images, or sets that do not fit together.
    """
    if hasattr(train, "load_split") and hasattr(train, "partitioners"):
        train, test, partition = _federated(train, test, partition)
    partitioner = partition if hasattr(partition, "load_partition") else None
    if partitioner is None and not isinstance(partition, str):
        raise ValueError(
            "partition: expected a name of `fedkd list partitions` or a partitioner of Flower "
            f"Datasets, got {partition!r}"
        )
    given = train
    train = as_image_set("train", train)
    test = as_image_set("test", test, train)
    if transfer_images is not None:
        transfer_images = as_image_set("transfer_images", transfer_images, train)
    if validation_images is not None:
        validation_images = as_image_set("validation_images", validation_images, train)
    _check_request(train, test, transfer_images, validation_images, transfer_labelled, holdout)
    if clients is None and partitioner is not None and partitioner.is_dataset_assigned():
        clients = partitioner.num_partitions
    clients = whole_number(clients, "clients")
    if domains is not None and clients < len(domains.sources):
        raise ValueError(
            f"domains.sources: {len(domains.sources)} domains for {clients} clients, so that one "
            "would have nobody; take more clients or fewer sources"
        )
    transfer_size = whole_number(transfer_size, "transfer_size", 1)
    validation_size = whole_number(validation_size, "validation_size", 0)
    test_size = None if test_size is None else whole_number(test_size, "test_size", 1)
    if private_size is not None:
        private_size = whole_number(private_size, "private_size", 1)
    seed = whole_number(seed, "seed")
    if not isinstance(partition_options, Mapping | None):
        raise ValueError(
            f"partition_options: expected a dictionary of options, got {partition_options!r}"
        )
    nobody = holders is not None and not holders
    holders = range(clients) if holders is None else holders
    private_size = 0 if nobody else private_size
    wanted = {
        "transfer": transfer_size if transfer_images is None else 0,
        "validation": validation_size if validation_images is None else 0,
        "private": len(holders) if private_size is None else private_size,
    }
    rows = _rows(
        wanted, len(train), seed, all_the_rest=private_size is None, transfer=transfer_rows
    )
    private = rows["private"].sort().values
    common = train if domains is None else domains.shown(train, domains.target, "train")
    if transfer_images is None:
        chosen = common.subset(rows["transfer"])
    else:
        if domains is not None:
            transfer_images = domains.shown(
                conform(transfer_images, train.shape), domains.target, "transfer"
            )
        chosen = conform(_draw("transfer", transfer_images, transfer_size, seed), common.shape)
    validation = common.subset(rows["validation"])
    if validation_images is not None and validation_size:
        drawn = _draw("validation", validation_images, validation_size, seed)
        validation = domains.shown(drawn, domains.target, "validation") if domains else drawn
    transfer = _transfer_set(chosen, train.classes, labelled=transfer_labelled)
    mean, std = transfer.images.statistics()
    codes = train.groups if partition == "group" else train.labels
    if codes is None:
        raise ValueError(
            "partition 'group': the images do not say where they come from; name an array of the "
            "file (npz: groups)"
        )
    parts = [np.empty(0, np.int64)] * clients
    if not nobody:
        options = partition_options or {}
        if partitioner is not None:
            if options:
                raise ValueError("partition_options: a partitioner has its own already")
            dealt = dealt_by(partitioner, given, train, private.numpy(), len(holders))
        else:
            dealt = deal(partition, codes[private].numpy(), len(holders), seed=seed, **options)
        for client, part in zip(holders, dealt, strict=True):
            parts[client] = part
    shards, holdouts = _kept_and_held(parts, private.numpy(), holdout, seed)
    if label_noise is not None:
        train = with_label_noise(train, shards, label_noise, seed=seed)
    tests = [test]
    if domains is not None:
        train = _in_domains(train, domains, shards, holdouts)
        shifts = (domains.target, *domains.sources)
        tests = [domains.shown(test, shift, "test") for shift in shifts]
    if test_size is not None:
        tests = [_draw("test", each, test_size, seed) for each in tests]
    return FederatedData(
        source=train,
        shard_rows=shards,
        holdout_rows=holdouts,
        transfer=transfer,
        validation=validation,
        test=tests[0],
        mean=mean,
        std=std,
        domains=domains,
        source_tests=tuple(tests[1:]),
    )


def _federated(source: Any, test: Any, partition: Any) -> tuple[Any, Any, Any]:
    """Training images, test images and partitioner of a `FederatedDataset`."""
    if partition is not None:
        raise ValueError("partition: a FederatedDataset has its own partitioner; leave it out")
    partitioners = source.partitioners
    if len(partitioners) != 1:
        raise ValueError(
            f"train: expected a FederatedDataset with one partitioner, got {len(partitioners)}: "
            f"{listed(list(partitioners))}"
        )
    ((split, partitioner),) = partitioners.items()
    return (
        source.load_split(split),
        source.load_split("test") if test is None else test,
        partitioner,
    )


def _in_domains(train: ImageSet, domains: Domains, *held: Sequence[np.ndarray]) -> ImageSet:
    """The training images, those that clients hold each in its client's domain."""
    pixels = domains.shown(train, Shift("plain"), "train").images.clone()
    for number, shift in enumerate(domains.sources):
        rows = [
            torch.from_numpy(mine)
            for parts in held
            for client, mine in enumerate(parts)
            if domains.number_of(client) == number
        ]
        those = torch.cat(rows)
        pixels[those] = domains.shown(train, shift, "train").images[those]
    return replace(train, images=pixels)


def _transfer_set(chosen: ImageSet, classes: tuple[str, ...], *, labelled: bool) -> TransferSet:
    """The common images, with the private images' classes and maybe without labels."""
    true_labels = chosen.labels if chosen.classes == classes else None
    images = replace(chosen, labels=true_labels if labelled else None, classes=classes)
    return TransferSet(images, true_labels, images.fingerprint())


def _kept_and_held(
    parts: Sequence[np.ndarray], rows: np.ndarray, holdout: float, seed: int
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Per client, the rows that it trains on and those that it holds out."""
    shards, holdouts = [], []
    for client, part in enumerate(parts):
        kept, held = hold_out(len(part), holdout, seed, client)
        shards.append(rows[part[kept]])
        holdouts.append(rows[part[held]])
    _check_disjoint([torch.from_numpy(part) for part in (*shards, *holdouts)])
    return tuple(shards), tuple(holdouts)


def _rows(
    wanted: Mapping[str, int],
    total: int,
    seed: int,
    *,
    all_the_rest: bool,
    transfer: Tensor | None = None,
) -> dict[str, Tensor]:
    """Rows of each set, drawn one after the other; the last takes `all_the_rest` if asked to."""
    if sum(wanted.values()) > total:
        listed = " + ".join(f"{count} {name}" for name, count in wanted.items() if count)
        raise ValueError(
            f"the training set has {total} images, but {listed} = {sum(wanted.values())} are "
            "asked for"
        )
    left, rows = torch.arange(total), {}
    for name, count in wanted.items():
        take = len(left) if all_the_rest and name == list(wanted)[-1] else count
        order = torch.randperm(len(left), generator=stream(seed, "split", name))
        if name == "transfer" and transfer is not None:  # still all are left: rows are places
            others = torch.ones(total, dtype=torch.bool)
            others[transfer] = False
            rows[name], left = transfer, others.nonzero().flatten()
            continue
        rows[name], left = left[order[:take]], left[order[take:].sort().values]
    _check_disjoint(list(rows.values()))
    return rows


def same_transfer(ours: str, theirs: str) -> bool:
    """Whether a node has the server's transfer set, or of pairs the server's side of each it has.

    Args:
        ours: `FederatedData.fingerprint` of the node.
        theirs: That of the server.
    """
    return set(ours.split(",")) <= set(theirs.split(","))


def overlaps(data: FederatedData) -> dict[str, int]:
    """Count pixel-identical images across private, transfer, validation and test images.

    `"private/test": 3` means that three private images also occur among the test images. The
    sets never share a row, but real data sets hold the same picture twice; that is logged. Of
    pairs each side is looked at: `"audio private/test": 3`.
    """
    if data.sides:
        counted = {name: overlaps(s) for name, s in data.sides.items()}
        return {f"{name} {pair}": n for name, own in counted.items() for pair, n in own.items()}
    everyone = np.concatenate([*data.shard_rows, *data.holdout_rows])
    hashes = {
        "private": _pixel_hashes(data.source.images, everyone),
        "transfer": _pixel_hashes(data.transfer.images.images),
        "validation": _pixel_hashes(data.validation.images),
        "test": _pixel_hashes(data.test.images),
    }
    counts = {}
    for first, second in itertools.combinations(hashes, 2):
        known = set(hashes[second])
        counts[f"{first}/{second}"] = sum(digest in known for digest in hashes[first])
    found = {pair: count for pair, count in counts.items() if count}
    if found:
        logger.warning(
            "pixel-identical images in two sets (%s): scores on them flatter slightly",
            ", ".join(f"{pair}: {count}" for pair, count in found.items()),
        )
    return counts


def _pixel_hashes(images: Tensor, rows: np.ndarray | None = None) -> list[bytes]:
    pixels = images.numpy()
    numbers = range(len(pixels)) if rows is None else rows
    return [hashlib.blake2b(pixels[row].tobytes(), digest_size=16).digest() for row in numbers]


def _draw(name: str, images: ImageSet, count: int, seed: int) -> ImageSet:
    if count > len(images):
        raise ValueError(f"{count} {name} images are asked for, but there are {len(images)}")
    order = torch.randperm(len(images), generator=stream(seed, "split", name))
    return images.subset(order[:count])


def hold_out(total: int, share: float, seed: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out) sorted positions in a client's `total` images."""
    count = min(max(1, round(share * total)), total - 1) if share > 0 else 0
    order = torch.randperm(total, generator=stream(seed, "split", "holdout", client)).numpy()
    return np.sort(order[count:]), np.sort(order[:count])


def _check_request(
    train: ImageSet,
    test: ImageSet,
    transfer: ImageSet | None,
    validation: ImageSet | None,
    transfer_labelled: bool,
    holdout: float,
) -> None:
    if train.labels is None or test.labels is None:
        raise ValueError("training and test images need labels")
    if not len(test):
        raise ValueError(
            "no test images: the student cannot be judged; give some (x_test and y_test in an "
            "npz, test/ in a folder), or more images per class"
        )
    if len(train.classes) < 2:
        raise ValueError(
            f"a student needs at least two classes to tell apart, found {listed(train.classes)}"
        )
    if validation is not None and (
        (validation.shape, validation.classes) != (train.shape, train.classes)
        or validation.labels is None
    ):
        raise ValueError(
            "validation images need labels, and the shape and classes of the training images"
        )
    if train.shape != test.shape:
        raise ValueError(f"training images are {train.shape}, test images are {test.shape}")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        how = f"{listed(odd)} are in one of them only" if odd else "their order differs"
        raise ValueError(f"training and test images have different classes: {how}")
    unseen = set(test.labels.unique().tolist()) - set(train.labels.unique().tolist())
    if unseen:
        logger.warning(
            "test images of %s, but no training images: nobody can learn it",
            listed([train.classes[row] for row in sorted(unseen)]),
        )
    if isinstance(holdout, bool) or not isinstance(holdout, Real):
        raise ValueError(f"holdout: expected a number, got {holdout!r}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be at least 0 and less than 1, got {holdout}")
    if (
        transfer is not None
        and transfer_labelled
        and (transfer.labels is None or transfer.classes != train.classes)
    ):
        raise ValueError(
            "the transfer images come from another data set without labels of these classes; "
            "set transfer_labelled to false"
        )


def _check_disjoint(parts: list[Tensor]) -> None:
    rows = torch.cat(parts)
    if len(rows.unique()) != len(rows):
        raise RuntimeError("one image was drawn into two sets")
