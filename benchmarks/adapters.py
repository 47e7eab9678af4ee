"""What learns in a frozen network, on even terms: one grid of learning rates for each method.

One client with images of classes that its network has never seen, as in configs/peft/lora.yaml,
trained by the functions that a run trains with. The learning rate of each method is the one with
the best accuracy on validation images with the first seed; then come the other seeds.

    python benchmarks/adapters.py --base fashion_base.pt [--epsilon 8]
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import torch

import fedkd
from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.models.network import Network, trainable_count
from fedkd.privacy.accounting import noise_for
from fedkd.privacy.dp_sgd import Mechanism, fit_private
from fedkd.training.evaluation import evaluate
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import fit

METHODS: dict[str, object] = {
    "full": None,
    "lora": {"method": "lora", "r": 8},
    "lora, norms": {"method": "lora", "r": 8, "train": ["head", "norm"]},
    "lora, linear r 2": {"method": "lora", "r": 2, "targets": "linear"},
    "adapter": "adapter",
    "head": "head",
}

RATES = (0.001, 0.003, 0.01, 0.03)
TRAIN, VALIDATION, TEST = 600, 1000, 2000
DELTA = 1e-4


def images(seed: int) -> tuple[ImageSet, ImageSet, ImageSet]:
    """A client's images of the classes 5 to 9, validation images and test images."""
    place = Path(os.environ.get("FEDKD_DATA") or ".")
    train, test = load_dataset("fashion_mnist", place, classes=[5, 6, 7, 8, 9])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    private, held = order[:TRAIN], order[TRAIN : TRAIN + VALIDATION]
    return train.subset(private), train.subset(held), test.subset(torch.arange(TEST))


def trained(
    base: str, peft: object, lr: float, seed: int, epsilon: float | None
) -> tuple[Network, float, float]:
    """A teacher, and its accuracy on validation and test images."""
    private, held, test = images(seed)
    options = {} if peft is None else {"peft": peft}
    network = fedkd.network("vit_tiny", private, seed=seed, weights=base, **options)
    optimizer = Optimizer(name="adamw", lr=lr, weight_decay=0.01)
    if epsilon is None:
        fit(network, private, epochs=8, batch_size=32, optimizer=optimizer, seed=seed)
    else:
        steps = Mechanism.of(TRAIN, 150, 10, 1.0)
        noise = noise_for(epsilon, DELTA, steps.sample_rate, steps.steps)
        private_steps = Mechanism.of(TRAIN, 150, 10, noise)
        fit_private(
            network, private, private_steps, optimizer=optimizer, seed=seed, noise_seed=seed
        )
    return network, evaluate(network, held), evaluate(network, test)


def main() -> None:
    """Print a line for each training, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", required=True, help="a vit_tiny trained on the classes 0 to 4")
    parser.add_argument("--epsilon", type=float, help="train with DP-SGD")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    rows = []
    for method in given.methods:
        found = {}
        for lr in given.rates:
            network, held, test = trained(given.base, METHODS[method], lr, 0, given.epsilon)
            found[lr] = held, test
            print(f"{method}, lr {lr:g}: {held:.3f} validation, {test:.3f} test", flush=True)
        best = max(found, key=lambda lr: found[lr][0])
        tests = [found[best][1]]
        for seed in range(1, given.seeds):
            tests.append(trained(given.base, METHODS[method], best, seed, given.epsilon)[2])
        count = trainable_count(network)
        spread = statistics.stdev(tests) if len(tests) > 1 else 0.0
        line = f"{100 * statistics.mean(tests):.1f} ± {100 * spread:.1f}"
        rows.append(f"| {method} | {count:,} | {best:g} | {line} |")
        print(rows[-1], flush=True)
    print(
        "\n".join(["", "| what learns | parameters | lr | accuracy |", "|---|---|---|---|", *rows])
    )


if __name__ == "__main__":
    main()
