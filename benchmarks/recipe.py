"""The recipe beside others: one setting of scikit-learn's digits, teachers trained once per seed.

Three minutes on one core: python benchmarks/recipe.py [--clients 3] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
from statistics import fmean, stdev

import fedkd
from fedkd.losses import LOSSES

MODELS = {3: ("mlp", "cnn_tiny", "mixer"), 4: ("mlp", "cnn_tiny", "mlp", "resnet8")}


def term(name: str, weight: float = 1.0, **options: float) -> fedkd.Term:
    """A weighted loss."""
    return fedkd.Term(name, LOSSES.create(name, **options), weight)


def soft() -> list[fedkd.Term]:
    """The quickstart's objective."""
    return [term("dkd", alpha=1.0, beta=2.0, temperature=2.0), term("vrm")]


def main() -> None:
    """Print a row per choice: accuracy of the student for each seed, mean and deviation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, choices=tuple(MODELS), default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    train, test = fedkd.load_dataset("digits")
    rows: dict[str, list[float]] = {}
    for seed in given.seeds:
        data = fedkd.federate(
            train,
            test,
            clients=given.clients,
            partition="dirichlet",
            partition_options={"alpha": 0.5},
            transfer_size=300,
            seed=seed,
        )
        transfer = data.transfer.images
        shards = [data.shard(client) for client in range(given.clients)]
        teachers = [
            fedkd.train_teacher(fedkd.network(model, transfer, seed=number), shard, seed=number)
            for number, model, shard in zip(
                range(100 * seed, 100 * seed + given.clients), MODELS[given.clients], shards
            )
        ]
        best = max(fedkd.evaluate(teacher, data.test) for teacher in teachers)
        rows.setdefault("best teacher", []).append(best)
        choices: dict[str, dict[str, object]] = {
            "the recipe": {},
            "fusion class_gated": {"fusion": ["class_gated"]},
            "fusion uniform": {"fusion": ["uniform"]},
            "fusion coverage": {"fusion": ["coverage"]},
            "fusion entropy": {"fusion": ["entropy"]},
            "the quickstart's losses": {"losses": soft()},
            "dkd + vrm, as published": {"losses": ["dkd", "vrm"]},
        }
        for name, changes in choices.items():
            student = fedkd.train_student(
                "cnn_small", teachers, transfer, shards=shards, seed=seed, **changes
            )
            rows.setdefault(name, []).append(fedkd.evaluate(student, data.test))
    for name, values in rows.items():
        single = ", ".join(f"{value:.1%}" for value in values)
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{name:26} {fmean(values):.1%}{spread}   {single}")


if __name__ == "__main__":
    main()
