"""Wrong labels, as data: what a training on private images is given instead of the truth.

The true labels stay beside the given ones (`ImageSet.true_labels`) to measure by. No training
reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedkd.data.arrays import read_npz
from fedkd.data.datasets import CIFAR10, CIFAR100, DIGITS
from fedkd.data.images import ImageSet
from fedkd.data.labels import check_range, label_numbers, listed
from fedkd.data.pictures import shown
from fedkd.randomness import stream

Kind = Literal["symmetric", "asymmetric", "pair", "instance", "file"]

# CIFAR-100's coarse classes. A fine one is mistaken for the next of its coarse class.
_COARSE = """
beaver dolphin otter seal whale; aquarium_fish flatfish ray shark trout;
orchid poppy rose sunflower tulip; bottle bowl can cup plate;
apple mushroom orange pear sweet_pepper; clock keyboard lamp telephone television;
bed chair couch table wardrobe; bee beetle butterfly caterpillar cockroach;
bear leopard lion tiger wolf; bridge castle house road skyscraper;
cloud forest mountain plain sea; camel cattle chimpanzee elephant kangaroo;
fox porcupine possum raccoon skunk; crab lobster snail spider worm;
baby boy girl man woman; crocodile dinosaur lizard snake turtle;
hamster mouse rabbit shrew squirrel; maple_tree oak_tree palm_tree pine_tree willow_tree;
bicycle bus motorcycle pickup_truck train; lawn_mower rocket streetcar tank tractor
"""


def _next_of_coarse() -> dict[str, str]:
    groups = [group.split() for group in _COARSE.split(";")]
    return {a: b for group in groups for a, b in pairwise([*group, group[0]])}


# Class names -> which class is mistaken for which; the others are not.
_ASYMMETRIC = {
    CIFAR10: {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog",
              "dog": "cat"},
    CIFAR100: _next_of_coarse(),
    DIGITS: {"2": "7", "3": "8", "7": "1", "5": "6", "6": "5"},
}  # fmt: skip


@dataclass(frozen=True)
class LabelNoise:
    """How labels go wrong.

    Attributes:
        kind: `symmetric`: a drawn label is uniform over all classes, the true one too, so that
            (C - 1) / C of the drawn ones are wrong. `asymmetric`: classes are mistaken for similar
            ones (CIFAR-10, CIFAR-100, digits). `pair`: for the next class. `instance`: by what an
            image looks like, at a rate of its own around `rate`. `file`: labels from a file.
        rate: Share of the labels that are drawn; not of `file`.
        file: `file`: labels of all training images in their order, an .npz or .npy.
        key: `file`: the array's name in an .npz of several.
        clients: Share of the clients whose labels go wrong, at least one.

    References:
        `symmetric`, `asymmetric` (CIFAR) as Li et al., "DivideMix", ICLR 2020,
            https://arxiv.org/abs/2002.07394
        `asymmetric` (digits) as Patrini et al., "Making Deep Neural Networks Robust to Label
            Noise", CVPR 2017, https://arxiv.org/abs/1609.03683
        `instance` as Xia et al., "Part-dependent Label Noise", NeurIPS 2020,
            https://arxiv.org/abs/2006.07836
    """

    kind: Kind
    rate: float | None = None
    file: Path | None = None
    key: str | None = None
    clients: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not 0 < self.clients <= 1:
            raise ValueError(f"clients: expected a share above 0, up to 1, got {self.clients!r}")
        if self.kind == "file":
            if self.file is None:
                raise ValueError("file: kind 'file' needs an .npz or .npy of labels, got none")
            if self.rate is not None:
                raise ValueError(f"rate: kind 'file' has its own, got {self.rate:g}; leave it out")
            return
        for key in ("file", "key"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: kind {self.kind!r} reads no file; leave it out")
        if self.rate is None or not 0 <= self.rate <= 1:
            raise ValueError(f"rate: kind {self.kind!r} needs a share from 0 to 1, got {self.rate}")


def with_label_noise(
    images: ImageSet, parts: Sequence[np.ndarray], noise: LabelNoise, *, seed: int
) -> ImageSet:
    """The same images with wrong labels among some, and with their true labels beside them.

    Args:
        images: Labelled, all training images in their order.
        parts: Per client the rows of its training images; no other label goes wrong.
        noise: How.
        seed: The run's seed. A client's draws do not depend on the other clients.

    Raises:
        ValueError: the images cannot have this noise.
        FileNotFoundError: there is no file of labels.
    """
    assert images.labels is not None
    given, classes = images.labels.clone(), len(images.classes)
    table = _read_labels(noise, images) if noise.kind == "file" else None
    for client in noisy_clients(noise, len(parts), seed):
        rows = torch.from_numpy(np.asarray(parts[client], dtype=np.int64))
        if table is not None:
            given[rows] = table[rows]
            continue
        assert noise.rate is not None
        true, generator = images.labels[rows], stream(seed, "label noise", client)
        if noise.kind == "instance":
            pixels = images.images[rows].flatten(1).double().div(127.5).sub(1)
            given[rows] = _by_instance(pixels, true, classes, noise.rate, seed, generator)
            continue
        count = round(noise.rate * len(rows))
        drawn = torch.randperm(len(rows), generator=generator)[:count]
        if noise.kind == "symmetric":
            given[rows[drawn]] = torch.randint(classes, (count,), generator=generator)
        else:
            given[rows[drawn]] = _mistaken(noise.kind, images.classes)[true[drawn]]
    return replace(images, labels=given, true_labels=images.labels)


def noisy_clients(noise: LabelNoise, clients: int, seed: int) -> list[int]:
    """Whose labels go wrong, sorted."""
    order = torch.randperm(clients, generator=stream(seed, "label noise", "clients"))
    return sorted(order[: max(1, round(noise.clients * clients))].tolist())


def _mistaken(kind: str, classes: tuple[str, ...]) -> Tensor:
    """Class -> the one that it is mistaken for."""
    if kind == "pair":
        return torch.arange(1, len(classes) + 1) % len(classes)
    known = _ASYMMETRIC.get(classes)
    if known is None:
        raise ValueError(
            "label_noise.kind: 'asymmetric' knows the similar classes of CIFAR-10, CIFAR-100 and "
            f"digits, not of {listed(classes, 3)}; use 'pair'"
        )
    return torch.tensor([classes.index(known.get(name, name)) for name in classes])


def _by_instance(
    pixels: Tensor,
    true: Tensor,
    classes: int,
    rate: float,
    seed: int,
    generator: torch.Generator,
) -> Tensor:
    """Labels drawn by what images look like: pixels (N, D) -> (N,).

    An image's rate is normal around `rate` (deviation 0.1, cut to 0 to 1). To which other class it
    goes follows from its projection by a matrix of its class, the same for all clients.
    """
    # Between the quantiles of 0 and 1, so that the normal is cut and not clipped.
    low, high = (torch.special.ndtr(torch.tensor((end - rate) / 0.1).double()) for end in (0, 1))
    uniform = torch.rand(len(true), generator=generator, dtype=torch.float64)
    rates = (rate + 0.1 * torch.special.ndtri(low + (high - low) * uniform)).clamp(0, 1)
    chances = torch.zeros(len(true), classes, dtype=torch.float64)
    for label in true.unique().tolist():
        rows = (true == label).nonzero().flatten()
        drawn = stream(seed, "label noise", "class", label)
        matrix = torch.randn(pixels.shape[1], classes, generator=drawn, dtype=torch.float64)
        scores = pixels[rows] @ matrix
        scores[:, label] = -torch.inf
        chances[rows] = rates[rows, None] * scores.softmax(dim=1)
        chances[rows, label] += 1 - rates[rows]
    point = torch.rand(len(true), 1, generator=generator, dtype=torch.float64)
    return (chances.cumsum(dim=1) < point).sum(dim=1).clamp(max=classes - 1)


def _read_labels(noise: LabelNoise, images: ImageSet) -> Tensor:
    """The labels of all training images, from a file."""
    file = noise.file
    assert file is not None
    if not file.is_file():
        raise FileNotFoundError(
            f"label_noise.file: there is no file {shown(file.absolute())}; expected an .npz or "
            ".npy with the labels of all training images in their order"
        )
    what = f"label_noise.file: {shown(file)}"
    if file.suffix == ".npy":
        if noise.key is not None:
            raise ValueError(f"label_noise.key: {shown(file)} is one array; leave the key out")
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{what}: not an .npy file of numbers ({error})") from None
    else:
        arrays = read_npz(file)
        key = noise.key or (next(iter(arrays)) if len(arrays) == 1 else None)
        if key is None or key not in arrays:
            raise ValueError(
                f"label_noise.key: expected one of {listed(sorted(arrays))} in {shown(file)}, got "
                f"{noise.key}"
            )
        array, what = arrays[key], f"{what}: {key}"
    labels = label_numbers(array, what)
    if len(labels) != len(images):
        raise ValueError(
            f"{what}: {len(labels)} labels for {len(images)} training images; expected one for "
            "each, in their order"
        )
    try:
        check_range(labels, images.classes)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return labels
