"""Server cost of many teachers: seconds and resident memory of accepting and fusing a round.

    python benchmarks/fusion_memory.py [--clients 100] [--samples 50000] [--classes 100]

Knowledge is spilled to disk as it arrives and fused some samples at a time, so what is resident
must not grow with the number of clients: the benchmark prints it for a tenth of the clients and
for all of them, measured in processes of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fedkd.fusion import FUSIONS
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Knowledge, Teacher, fuse
from fedkd.knowledge.store import KnowledgeStore


def resident_mb(field: str) -> float:
    """RssAnon (what the process itself holds) or VmHWM (its peak, mapped files included)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(clients: int, samples: int, classes: int) -> None:
    """Accept and fuse one round; print seconds and memory."""
    torch.set_num_threads(1)
    rule = FUSIONS.create("class_gated")
    with tempfile.TemporaryDirectory() as folder:
        store = KnowledgeStore(Path(folder))
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(samples, classes, generator=generator).half()
        before = resident_mb("RssAnon")
        accepted = time.perf_counter()
        for client in range(clients):
            counts = tuple(torch.randint(50, (classes,), generator=generator).tolist())
            store.put(Knowledge(Teacher(client, sum(counts), counts), {Logits(): logits}))
        fused = time.perf_counter()
        fuse(store.bank([Logits()]), [rule], store=store.allocate)
        done = time.perf_counter()
    print(
        f"{clients:5d} clients x {samples:,} x {classes}: accept {fused - accepted:6.1f} s, "
        f"fuse {done - fused:6.1f} s, grown by {resident_mb('RssAnon') - before:6.0f} MB, "
        f"peak {resident_mb('VmHWM'):6.0f} MB with mapped files"
    )


def main() -> None:
    """Both sizes, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.clients, options.samples, options.classes)
        return
    for clients in (max(1, options.clients // 10), options.clients):
        words = ["--clients", clients, "--samples", options.samples, "--classes", options.classes]
        command = [sys.executable, __file__, "--one", *map(str, words)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
