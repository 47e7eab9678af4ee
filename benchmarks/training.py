"""Local training of the configs' teachers on a CPU: two versions of fedkd against each other.

    PYTHONPATH=. python benchmarks/training.py --against ../other/checkout

Teachers of the quickstart and of configs/fashion_mnist.yaml on random pixels. Both versions train
in turns; printed are the least CPU time of a step in each, their ratio, and whether the weights are
the same bit by bit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

# Network, side, images of a client, batch size, epochs, recipe, label smoothing, learning rate.
CASES = {
    "cnn_tiny": (8, 104, 16, 10, "none", 0.1, 0.003),
    "mlp": (8, 104, 16, 10, "none", 0.1, 0.003),
    "resnet8": (8, 104, 16, 10, "none", 0.1, 0.003),
    "mixer": (8, 104, 16, 10, "none", 0.1, 0.003),
    "cnn_small": (28, 500, 32, 2, "crop_flip", 0.0, 0.002),
}


def main() -> None:
    """Time both, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    workers = [_Worker(folder, given.threads) for folder in (given.against, here)]
    print("network    before µs  now µs  ratio  weights")
    for name in CASES:
        runs = [[worker.ask(name) for worker in workers] for _ in range(given.times)]
        before, now = (min(run[side][0] for run in runs) for side in (0, 1))
        same = "same" if len({run[side][1] for run in runs for side in (0, 1)}) == 1 else "DIFFER"
        print(f"{name:10s} {before:9.0f} {now:7.0f} {before / now:6.2f}  {same}", flush=True)
    for worker in workers:
        worker.close()


class _Worker:
    """A process that trains with one version."""

    def __init__(self, folder: Path, threads: int) -> None:
        loop = _LOOP.format(file=str(Path(__file__).resolve()), threads=threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder.resolve())},
        )

    def ask(self, name: str) -> tuple[float, str]:
        """CPU time of a step in microseconds, hash of the weights."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(name, file=self._process.stdin, flush=True)
        microseconds, weights = self._process.stdout.readline().split()
        return float(microseconds), weights

    def close(self) -> None:
        """End it."""
        self._process.communicate()


_LOOP = """
import runpy, sys, torch
torch.set_num_threads({threads})
trained = runpy.run_path({file!r}, run_name="worker")["trained"]
for line in sys.stdin:
    print(*trained(line.strip()), flush=True)
"""


def trained(name: str) -> tuple[float, str]:
    """Train once: CPU time of a step in microseconds, hash of the weights."""
    import torch

    from fedkd.data.images import ImageSet
    from fedkd.models.build import build_model
    from fedkd.runs.directory import network_hash
    from fedkd.training.optimizers import Optimizer
    from fedkd.training.supervised import fit

    side, count, batch, epochs, augment, smoothing, lr = CASES[name]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 1, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=generator)
    network = build_model(
        name, num_classes=10, in_channels=1, image_size=side, mean=[0.3], std=[0.3]
    )
    shard = ImageSet(pixels, labels, tuple("0123456789"))
    start = time.process_time()
    fit(
        network,
        shard,
        epochs=epochs,
        batch_size=batch,
        optimizer=Optimizer(lr=lr, weight_decay=0.01),
        augment=augment,
        label_smoothing=smoothing,
        seed=3,
    )
    seconds = time.process_time() - start
    return seconds / (-(-count // batch) * epochs) * 1e6, network_hash(network)


if __name__ == "__main__":
    main()
