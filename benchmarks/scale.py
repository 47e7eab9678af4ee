"""Does a federation cost what it asks? Ever more clients, of whom as many are asked a round.

    python benchmarks/scale.py [--clients 100 1000 10000] [--asked 20] [--rounds 5]
                               [--runner local ray] [--out FILE]

Every client has the same few images, so a round is the same work whatever the number of clients.
Each case runs in a process of its own and prints seconds until round 1 begins (imports and Ray's
start counted), seconds a round (median after the first, in which caches fill), peak memory of
the server's process and of the largest worker, disk, bytes and messages. CPU seconds are those of
all processes and tell more than wall seconds where others work on the machine. The last column of
the table is the last case over the first one.

`Flower alone` is the same number of messages of the same size over Flower's simulation or the local
grid with a client app that does nothing: with the nodes that we register, and with a node for each
client.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
IMAGES = 6  # of a client
PHASES = 3  # train, knowledge, evaluate


def experiment_of(clients: int, asked: int, rounds: int, output: str) -> dict[str, Any]:
    """A tiny CNN on small pictures, the same data set for any number of clients."""
    return {
        "name": "scale",
        "clients": clients,
        "rounds": rounds,
        "output": output,
        "data": {
            "dataset": {"name": "synthetic", "classes": 10, "size": 8, "per_class": 6100},
            "partition": {"name": "inner_dirichlet", "alpha": 0.3},
            "private": IMAGES * clients,
            "transfer": {"size": 200},
            "test": 200,
        },
        "teachers": {"models": ["cnn_tiny"], "epochs": 5},
        "student": {"model": "cnn_tiny"},
        "distillation": {"epochs": 10},
        "federation": {"participation": asked, "codec": "int"},
        "evaluation": {"baselines": [], "clients": False},
    }


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peak resident MiB of this process and of the largest Ray worker, watched meanwhile."""
    import psutil

    found, over = {"server": 0.0, "worker": 0.0}, threading.Event()
    own = psutil.Process()

    def watch() -> None:
        while True:
            found["server"] = max(found["server"], own.memory_info().rss / 2**20)
            for child in own.children(recursive=True):
                try:
                    if "ClientAppActor" in child.name() or "ray::" in " ".join(child.cmdline()):
                        rss = child.memory_info().rss / 2**20
                        found["worker"] = max(found["worker"], rss)
                except psutil.Error:
                    continue
            if over.wait(0.5):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def spent() -> float:
    """CPU seconds of this process and of those below it."""
    import psutil

    total, own = 0.0, psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def ours(clients: int, asked: int, rounds: int, runner: str) -> dict[str, float]:
    """A run of ours."""
    import torch

    from fedkd.config import make_experiment
    from fedkd.runs.events import RoundFinished
    from fedkd.simulations.local import run_local
    from fedkd.simulations.ray import run_ray

    torch.set_num_threads(1)
    begun: list[tuple[float, float]] = []
    ended: list[tuple[float, float]] = []

    def watch(event: str, **_: Any) -> None:
        if event in ("round_start", "round"):
            now = (time.perf_counter(), spent())
            (begun if event == "round_start" else ended).append(now)

    with tempfile.TemporaryDirectory() as folder, peaks() as memory:
        experiment = make_experiment(experiment_of(clients, asked, rounds, folder))
        run = {"local": run_local, "ray": run_ray}[runner](experiment, notify=watch)
        done = time.perf_counter()
        messages = run.messages()
        finished = run.events(RoundFinished)
        assert [len(event.answered) for event in finished] == [asked] * rounds
        pairs = [*zip(begun, ended, strict=True)]
        seconds, work = ([end[i] - start[i] for start, end in pairs] for i in (0, 1))
        of_rounds = [m for m in messages if m.phase != "describe"]
        files = [path for path in run.path.rglob("*") if path.is_file()]
        return {
            "start-up, s": begun[0][0] - BEGAN,
            "start-up, CPU s": begun[0][1],
            "first round, s": seconds[0],
            "a later round, s": statistics.median(seconds[1:]),
            "a later round, CPU s": statistics.median(work[1:]),
            "summary and page, s": done - ended[-1][0],
            "server's peak, MiB": memory["server"],
            "largest worker's peak, MiB": memory["worker"],
            "disk, MB": sum(path.stat().st_size for path in files) / 1e6,
            "files": len(files),
            "page, kB": (run.path / "report.html").stat().st_size / 1e3,
            "messages a round": len(of_rounds) / rounds,
            "kB down a round": sum(m.down for m in of_rounds) / rounds / 1e3,
            "kB up a round": sum(m.up for m in of_rounds) / rounds / 1e3,
        }


def flower(nodes: int, asked: int, rounds: int, runner: str) -> dict[str, float]:
    """Flower alone: as many messages, and a client app that answers at once."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

    from fedkd.simulations.local import LocalGrid
    from fedkd.strategies.exchange import POLL_SECONDS
    from fedkd.strategies.messaging import exchanged

    client, server = ClientApp(), ServerApp()
    facts: dict[str, float] = {}

    @client.train()
    def answer(message: Message, _context: Any) -> Message:
        return Message(RecordDict({"r": ConfigRecord({"x": b"0" * 2000})}), reply_to=message)

    def make(node: int) -> Callable[[], Message]:
        content = RecordDict({"job": ConfigRecord({"x": b"0" * 60})})
        return lambda: Message(content, dst_node_id=node, message_type="train")

    def drive(grid: Grid) -> None:
        while len(list(grid.get_node_ids())) < nodes:
            time.sleep(0.01)
        chosen = sorted(grid.get_node_ids())[:asked]
        seconds, before = [], spent()
        facts["start-up, s"] = time.perf_counter() - BEGAN
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(PHASES):
                letters = {node: make(node) for node in chosen}
                arrived = 0
                for delivery in exchanged(grid, letters, deadline=60.0):
                    if delivery is None:
                        time.sleep(POLL_SECONDS)
                    arrived += delivery is not None
                assert arrived == len(chosen)
            seconds.append(time.perf_counter() - started)
        facts["first round, s"] = seconds[0]
        facts["a later round, s"] = statistics.median(seconds[1:])
        facts["a round, CPU s"] = (spent() - before) / rounds

    with peaks() as memory:
        if runner == "local":
            drive(LocalGrid(client, nodes))
        else:
            from flwr.simulation import run_simulation

            from fedkd.simulations.ray import OFFLINE

            os.environ.update(OFFLINE)
            server.main()(lambda grid, _context: drive(grid))
            run_simulation(
                server_app=server,
                client_app=client,
                num_supernodes=nodes,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0},
                    "init_args": {"address": "local", "log_to_driver": False},
                },
            )
    facts["server's peak, MiB"] = memory["server"]
    return facts


def measure(kind: str, count: int, asked: int, rounds: int, runner: str) -> dict[str, float]:
    """One case in a process of its own."""
    words = [sys.executable, __file__, "--one", kind, "--clients", count, "--asked", asked,
             "--rounds", rounds, "--runner", runner]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(word) for word in words], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(title: str, cases: dict[str, dict[str, float]]) -> str:
    """A markdown table with a column for each case, and the last over the first."""
    names, values = list(cases), list(cases.values())
    lines = [f"| {title} | {' | '.join(names)} | ratio |", "|---" * (len(names) + 2) + "|"]
    for row in values[0]:
        numbers = [case[row] for case in values]
        ratio = f"{numbers[-1] / numbers[0]:.2f}" if numbers[0] else "-"
        lines.append(f"| {row} | {' | '.join(f'{n:,.4g}' for n in numbers)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--asked", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runner", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--out", type=Path, help="also write the numbers there, as JSON")
    parser.add_argument("--one", choices=["ours", "flower"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked, rounds = options.asked, options.rounds
    if options.one:
        case = {"ours": ours, "flower": flower}[options.one]
        print(json.dumps(case(options.clients[0], asked, rounds, options.runner[0])))
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    for runner in options.runner:
        for kind in ("ours", "flower"):
            who = "clients" if kind == "ours" else "nodes"
            counts = options.clients if kind == "ours" else [64, *options.clients]
            title = f"{'Flower alone' if kind == 'flower' else 'fedkd'}, {runner}"
            found[title] = {
                f"{count:,} {who}": measure(kind, count, asked, rounds, runner) for count in counts
            }
            print(f"\n{table(title, found[title])}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
