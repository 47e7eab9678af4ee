"""Two experiments on what gets distilled, on scikit-learn's digits; a minute each on a quiet CPU.

    python benchmarks/properties.py colour [--seeds 3] [--biased 0.5] [--epochs 30]
    python benchmarks/properties.py seeds [--seeds 4]

`colour`: the digits that the students learn from are painted, so many of them (`--biased`) in the
colour of their class, the rest in any. The teacher has seen random colours alone, which are what
all are tested on. So is the control, a student of a teacher that saw the biased colours itself.

`seeds`: independent students by pairs, where no property may count: localisation is near 50 %.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import permutations

import torch

import fedkd
from fedkd.data.domains import Shift, shifted
from fedkd.data.images import ImageSet
from fedkd.losses.ce import CELoss
from fedkd.losses.kd import KDLoss
from fedkd.models.network import Network

OPTIMIZER = fedkd.Optimizer(name="adamw", lr=0.003, weight_decay=0.01)


def trained(
    like: ImageSet, images: ImageSet, width: int, *, seed: int, order: int, epochs: int
) -> Network:
    """A network by cross entropy: `seed` draws its weights, `order` its batches."""
    network = fedkd.network("cnn_small", like, seed=seed, width=width, norm="batch")
    return fedkd.train_teacher(
        network, images, epochs=epochs, batch_size=32, optimizer=OPTIMIZER, seed=order
    )


def distilled(teacher: Network, images: ImageSet, *, seed: int, epochs: int) -> Network:
    """A student of the teacher, from the weights that `trained` begins with."""
    network = fedkd.network("cnn_small", images, seed=seed, width=8, norm="batch")
    return fedkd.train_student(
        network,
        [teacher],
        images,
        losses=[
            fedkd.Term("ce", CELoss(), weight=0.1),
            fedkd.Term("kd", KDLoss(temperature=8.0), weight=0.9),
        ],
        fusion=[],
        epochs=epochs,
        batch_size=32,
        optimizer=OPTIMIZER,
        seed=seed,
    )


def colour(seeds: Sequence[int], biased: float, epochs: int) -> dict[str, list[float]]:
    """Accuracy on random colours, for each seed: teacher, distilled, independent, control."""
    train, test = fedkd.load_dataset("digits")
    few = train.subset(torch.arange(300))
    painted = shifted(few, Shift("colour", {"biased": biased}), "train")
    many = shifted(train, Shift("colour"), "train")
    unseen = shifted(test, Shift("colour"))
    own = shifted(train, Shift("colour", {"biased": biased}), "train")
    found: dict[str, list[float]] = {}
    teacher = trained(painted, many, 32, seed=99, order=99, epochs=6)
    biased_teacher = trained(painted, own, 32, seed=99, order=99, epochs=6)
    for seed in seeds:
        networks = {
            "teacher": teacher,
            "distilled": distilled(teacher, painted, seed=seed, epochs=epochs),
            "independent": trained(painted, painted, 8, seed=seed, order=seed, epochs=epochs),
            "teacher with the bias": biased_teacher,
            "its student": distilled(biased_teacher, painted, seed=seed, epochs=epochs),
        }
        for name, network in networks.items():
            found.setdefault(name, []).append(fedkd.evaluate(network, unseen))
        print({name: f"{100 * values[-1]:.1f}" for name, values in found.items()}, flush=True)
    return found


def pairs(seeds: Sequence[int]) -> dict[str, list[float]]:
    """Scores of independent students against each other's, for each ordered pair."""
    train, test = fedkd.load_dataset("digits")
    few = train.subset(torch.arange(300))
    teacher = trained(few, train, 32, seed=99, order=99, epochs=6)
    alone = [trained(few, few, 8, seed=seed, order=seed, epochs=30) for seed in seeds]
    found: dict[str, list[float]] = {}
    for first, second in permutations(alone, 2):
        measured = fedkd.inspect(second, teacher, test, alone=[first], what="localisation")
        found.setdefault("localisation", []).append(measured.properties["localisation"].student)
    return found


def main() -> None:
    """Print means and sample deviations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["colour", "seeds"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--biased", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(given.seeds)
    painted = given.what == "colour"
    found = colour(seeds, given.biased, given.epochs) if painted else pairs(seeds)
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"{name:24} {100 * statistics.fmean(values):5.1f} ± {100 * spread:.1f} %  "
            f"({', '.join(f'{100 * value:.1f}' for value in values)})"
        )


if __name__ == "__main__":
    main()
