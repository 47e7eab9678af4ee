"""Data and weights for configs/weights.yaml, server_teachers.yaml and compare/low_rank.yaml.

Writes, below FEDKD_DATA or this folder:

halves/second.npz   scikit-learn's digits 5 to 9
halves/vit.pt       a small vision transformer, trained on the digits 0 to 4
halves/private.npz  all digits but for 150 of the training images
halves/public.pt    a small CNN, trained on those 150

    python benchmarks/halves.py
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

MODEL = {"width": 32, "depth": 3, "heads": 4, "patch": 2}
EPOCHS = 20
PUBLIC = 150


def half(images: ImageSet, classes: range) -> ImageSet:
    """The images of some classes, numbered from 0."""
    assert images.labels is not None
    rows = torch.isin(images.labels, torch.tensor(list(classes))).nonzero().flatten()
    names = tuple(images.classes[number] for number in classes)
    return ImageSet(images.images[rows], images.labels[rows] - classes.start, names)


def write(path: Path, train: ImageSet, test: ImageSet) -> None:
    """Images and labels as arrays."""
    assert train.labels is not None
    assert test.labels is not None
    np.savez_compressed(
        path,
        x_train=train.images[:, 0].numpy(),
        y_train=train.labels.numpy(),
        x_test=test.images[:, 0].numpy(),
        y_test=test.labels.numpy(),
        classes=np.array(train.classes),
    )


def learnt(path: Path, name: str, images: ImageSet, test: ImageSet, **options: object) -> None:
    """Train a network and write it."""
    network = fedkd.network(name, images, **options)
    fedkd.train_teacher(network, images, epochs=EPOCHS, batch_size=32)
    about = {"model": name, "options": options, "classes": list(images.classes)}
    torch.save({**about, "weights": network.state_dict()}, path)
    print(f"{path}: accuracy on the test images of its classes {evaluate(network, test):.3f}")


def main() -> None:
    """Write the files."""
    folder = Path(os.environ.get("FEDKD_DATA") or ".") / "halves"
    folder.mkdir(exist_ok=True)
    train, test = load_dataset("digits")
    first, second = range(5), range(5, 10)
    write(folder / "second.npz", half(train, second), half(test, second))
    learnt(folder / "vit.pt", "vit_tiny", half(train, first), half(test, first), **MODEL)
    public, private = torch.arange(PUBLIC), torch.arange(PUBLIC, len(train))
    write(folder / "private.npz", train.subset(private), test)
    learnt(folder / "public.pt", "cnn_small", train.subset(public), test)


if __name__ == "__main__":
    main()
