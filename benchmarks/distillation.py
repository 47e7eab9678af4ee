"""A run's distillation alone, on a CPU: to hold two versions of fedkd against each other.

    PYTHONPATH=. python benchmarks/distillation.py configs/quickstart.yaml --epochs 6

Needs the config's images. Teachers' answers are made up, for as many as it has clients.
Prints seconds, CPU seconds and the hash of the student, which must be the same for both versions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from fedkd.build import build_optimizer
from fedkd.config import load_experiment
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.trainer import distill
from fedkd.knowledge.payload import Bank, Fused, Knowledge, Teacher, fuse
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.directory import network_hash


def main() -> None:
    """Time it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    context = ExperimentContext(load_experiment(given.config))
    experiment, generator = context.experiment, torch.Generator().manual_seed(0)
    images, classes = context.data.transfer.images.images, len(context.data.classes)
    shape = len(images), classes
    knowledge = [
        Knowledge(
            Teacher(number),
            {kind: torch.randn(shape, generator=generator) for kind in context.objective.needs},
        )
        for number in range(experiment.clients)
    ]
    fused = fuse(Bank.of(knowledge), [])
    _run(context, fused, 1)
    wall, cpu = time.perf_counter(), time.process_time()
    found = _run(context, fused, given.epochs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{given.config.stem}: {wall:.2f} s, {cpu:.2f} s of CPU, student {found}")


def _run(context: ExperimentContext, fused: Fused, epochs: int) -> str:
    experiment = context.experiment
    student = context.network(experiment.student.model, "student")
    batches = TransferBatches(
        context.data.transfer.images.images,
        fused,
        views=context.views(1),
        batch_size=experiment.distillation.batch_size,
        seed=1,
    )
    optimizer = build_optimizer(experiment.distillation.optimizer)
    distill(student, batches, context.objective, epochs=epochs, optimizer=optimizer, seed=1)
    return network_hash(student)


if __name__ == "__main__":
    main()
