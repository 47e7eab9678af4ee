"""Data and weights for configs/compare/low_rank.yaml: what was learnt on one half of the classes.

Writes, below FEDKD_DATA (which holds FashionMNIST/raw already):

halves/first.npz, halves/second.npz     Fashion-MNIST's classes 0 to 4, and 5 to 9
halves/vit.pt                           a small vision transformer, trained on the first half

    python -m benchmarks.fashion_halves
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

import fedkd
from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.training.evaluation import evaluate

MODEL = {"width": 64, "depth": 4, "heads": 4, "patch": 4}
IMAGES, EPOCHS = 10_000, 6


def half(images: ImageSet, classes: range) -> ImageSet:
    """The images of some classes, numbered from 0."""
    assert images.labels is not None
    rows = torch.isin(images.labels, torch.tensor(list(classes))).nonzero().flatten()
    names = tuple(images.classes[number] for number in classes)
    return ImageSet(images.images[rows], images.labels[rows] - classes.start, names)


def main() -> None:
    """Write the files."""
    folder = Path(os.environ["FEDKD_DATA"]) / "halves"
    folder.mkdir(exist_ok=True)
    train, test = load_dataset("fashion_mnist")
    for name, classes in (("first", range(5)), ("second", range(5, 10))):
        seen, shown = half(train, classes), half(test, classes)
        assert seen.labels is not None
        assert shown.labels is not None
        np.savez_compressed(
            folder / f"{name}.npz",
            x_train=seen.images[:, 0].numpy(),
            y_train=seen.labels.numpy(),
            x_test=shown.images[:, 0].numpy(),
            y_test=shown.labels.numpy(),
            classes=np.array(seen.classes),
        )
    seen, shown = half(train, range(5)), half(test, range(5))
    some = seen.subset(torch.arange(IMAGES))
    network = fedkd.network("vit_tiny", some, **MODEL)
    fedkd.train_teacher(network, some, epochs=EPOCHS, batch_size=64)
    about = {"model": "vit_tiny", "options": MODEL, "classes": list(some.classes)}
    torch.save({**about, "weights": network.state_dict()}, folder / "vit.pt")
    print(f"accuracy on the first half's test images: {evaluate(network, shown).accuracy:.3f}")


if __name__ == "__main__":
    main()
