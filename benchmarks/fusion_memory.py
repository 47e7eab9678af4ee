"""Server cost of many teachers: seconds and resident memory of accepting and fusing a round.

    python benchmarks/fusion_memory.py [--clients 100] [--samples 50000] [--classes 100]
    python benchmarks/fusion_memory.py --rates [--clients 100] [--samples 1000] [--classes 10]

Knowledge is spilled to disk as it arrives and fused some samples at a time, so what is resident
must not grow with the number of clients: the benchmark prints it for a tenth of the clients and
for all of them, measured in processes of their own. `--rates` fuses with every rule instead and
prints how many answers, one client about one image, each fuses in a second.
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
from fedkd.fusion.base import FitContext, fit_rules
from fedkd.knowledge.kinds import DensityRatio, Logits
from fedkd.knowledge.payload import Bank, Knowledge, Teacher, fuse
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


def rates(clients: int, samples: int, classes: int) -> None:
    """Fit and apply every rule once, answers in memory; print a line for each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(1, 50, (clients, classes), generator=generator).tolist()
    bank = Bank.of(
        [
            Knowledge(
                Teacher(client, sum(counts), tuple(counts)),
                {
                    Logits(): 3 * torch.randn(samples, classes, generator=generator),
                    DensityRatio(): torch.rand(samples, generator=generator),
                },
            )
            for client, counts in enumerate(draw)
        ]
    )
    labels = torch.arange(samples) % classes
    print(f"{clients} clients x {samples:,} x {classes}, one thread")
    for name in FUSIONS.names():
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            rules = fit_rules([FUSIONS.create(name)], FitContext(bank, labels=labels))
            fuse(bank, rules)
            seconds.append(time.perf_counter() - started)
        print(f"{name:>17} {clients * samples / min(seconds):12,.0f} answers a second")


def main() -> None:
    """Both sizes, each in a fresh process; or all rules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--rates", action="store_true", help="seconds of every rule instead")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    samples = options.samples or (1000 if options.rates else 50_000)
    classes = options.classes or (10 if options.rates else 100)
    if options.rates or options.one:
        (rates if options.rates else measure)(options.clients, samples, classes)
        return
    for clients in (max(1, options.clients // 10), options.clients):
        words = ["--clients", clients, "--samples", samples, "--classes", classes]
        command = [sys.executable, __file__, "--one", *map(str, words)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
