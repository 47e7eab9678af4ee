"""Data and weights for configs/compare/low_rank.yaml: what was learnt on one half of the classes.

Writes, below FEDKD_DATA or this folder:

halves/second.npz   scikit-learn's digits 5 to 9
halves/vit.pt       a small vision transformer, trained on the digits 0 to 4

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


def half(images: ImageSet, classes: range) -> tuple[ImageSet, np.ndarray]:
    """The images of some classes, numbered from 0, and their numbers."""
    assert images.labels is not None
    rows = torch.isin(images.labels, torch.tensor(list(classes))).nonzero().flatten()
    labels = images.labels[rows] - classes.start
    names = tuple(images.classes[number] for number in classes)
    return ImageSet(images.images[rows], labels, names), labels.numpy()


def main() -> None:
    """Write the files."""
    folder = Path(os.environ.get("FEDKD_DATA") or ".") / "halves"
    folder.mkdir(exist_ok=True)
    train, test = load_dataset("digits")
    (seen, labels), (shown, answers) = half(train, range(5, 10)), half(test, range(5, 10))
    np.savez_compressed(
        folder / "second.npz",
        x_train=seen.images[:, 0].numpy(),
        y_train=labels,
        x_test=shown.images[:, 0].numpy(),
        y_test=answers,
        classes=np.array(seen.classes),
    )
    (seen, _), (shown, _) = half(train, range(5)), half(test, range(5))
    network = fedkd.network("vit_tiny", seen, **MODEL)
    fedkd.train_teacher(network, seen, epochs=EPOCHS, batch_size=32)
    about = {"model": "vit_tiny", "options": MODEL, "classes": list(seen.classes)}
    torch.save({**about, "weights": network.state_dict()}, folder / "vit.pt")
    print(f"accuracy on the first half's test images: {evaluate(network, shown):.3f}")


if __name__ == "__main__":
    main()
