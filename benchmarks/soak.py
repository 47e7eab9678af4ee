"""Does a long run stay as it began? Memory and file handles over hundreds of rounds.

    python benchmarks/soak.py --rounds 500 [--runner ray]
    python benchmarks/soak.py --rounds 300 --clients 10 --hostile 3

A federation of tiny clients on invented images. The last `--hostile` of them change every reply of
every message type at random, or answer with an error of random text. Prints resident memory (of
this process and its children), open files and threads as the rounds go by, and the growth per
hundred rounds after the first fifth, in which caches fill.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fedkd.config import make_experiment  # noqa: E402
from fedkd.runs.events import ReplyRefused, RoundFinished  # noqa: E402
from fedkd.simulations.client_app import make_client_app  # noqa: E402
from fedkd.simulations.local import run_local  # noqa: E402
from fedkd.simulations.ray import run_ray  # noqa: E402
from tests.strategies.mutations import REASONS, mutated  # noqa: E402

EXPERIMENT: dict[str, Any] = {
    "name": "soak",
    "clients": 3,
    "data": {
        "dataset": {"name": "synthetic", "classes": 4, "size": 8, "per_class": 200},
        "transfer": {"size": 48},
        "test": 60,
    },
    "teachers": {"models": ["mlp", "cnn_tiny"], "epochs": 1},
    "student": {"model": "cnn_tiny"},
    "fusion": ["density_ratio"],
    "distillation": {"losses": ["dkd", "vrm"], "epochs": 1},
    "evaluation": {"baselines": []},
}


def usage() -> tuple[float, int, int]:
    """MiB of memory, open files and threads of this process and all below it."""
    memory, files, threads = 0.0, 0, 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            memory += process.memory_info().rss / 2**20
            files += process.num_fds()
            threads += process.num_threads()
        except psutil.NoSuchProcess:
            continue
    return memory, files, threads


def slope(points: list[tuple[int, float]]) -> float:
    """Least-squares growth per hundred rounds."""
    rounds = torch.tensor([float(number) for number, _ in points])
    values = torch.tensor([float(value) for _, value in points])
    rounds = rounds - rounds.mean()
    return 100 * float((rounds * (values - values.mean())).sum() / rounds.square().sum())


def hostile_app(first: int) -> Any:
    """The client app; clients from `first` on send garbage whatever they are asked."""
    draw = random.Random(0)

    def mod(message: Any, context: Any, call_next: Any) -> Any:
        reply = call_next(message, context)
        if int(context.node_config["partition-id"]) < first:
            return reply
        if message.metadata.message_type == "query.describe":
            return reply  # a node that says nonsense of itself is never asked again
        if draw.random() < 0.2:
            raise RuntimeError(draw.choice(REASONS))
        reply.content = mutated(reply.content, draw)
        return reply

    return make_client_app([mod])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--hostile", type=int, default=0)
    parser.add_argument("--runner", choices=["local", "ray"], default="local")
    words = parser.parse_args()
    torch.set_num_threads(1)
    seen: list[tuple[int, float, int, int]] = []

    def watch(event: str, **facts: Any) -> None:
        if event != "round":
            return
        number = int(facts["round"])
        seen.append((number, *usage()))
        if number % max(1, words.rounds // 10) == 0 or number == 1:
            _, memory, files, threads = seen[-1]
            print(f"round {number:>5}  {memory:8.1f} MiB  {files:>5} files  {threads:>4} threads")

    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(
            {
                **EXPERIMENT,
                "rounds": words.rounds,
                "clients": words.clients,
                "output": folder,
            }
        )
        app = hostile_app(words.clients - words.hostile) if words.hostile else None
        runner = run_ray if words.runner == "ray" else run_local
        run = runner(experiment, notify=watch, client_app=app)
        rounds = run.events(RoundFinished)
        counted = run.messages()
        print(
            f"{len(rounds)} rounds, {sum(event.status == 'ok' for event in rounds)} ok; "
            f"{len(run.events(ReplyRefused))} replies refused; {len(counted)} messages counted, "
            f"{sum(message.up for message in counted):,} bytes up; metrics.jsonl "
            f"{(run.path / 'metrics.jsonl').stat().st_size / len(rounds):,.0f} bytes a round"
        )
    late = seen[len(seen) // 5 :]
    print("growth per hundred rounds after the first fifth:")
    for place, unit in ((1, "MiB"), (2, "files"), (3, "threads")):
        print(f"  {slope([(row[0], row[place]) for row in late]):+8.2f} {unit}")


if __name__ == "__main__":
    main()
