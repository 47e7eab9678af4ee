"""Which machines compute the same bits."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "opacus")


def machine() -> str:
    """Libraries and processor: all that floating-point results on a CPU are known to depend on.

    Kernels are chosen by instruction set, and block sizes by caches, so a processor counts by its
    name, its flags and its caches. Two machines with one name give the same bits; whether two
    names do is not known.
    """
    words = [f"{name} {version(name)}" for name in LIBRARIES]
    words.append(" ".join(platform.libc_ver()))
    return ", ".join([*words, torch.backends.cpu.get_cpu_capability(), _processor()])


def _processor() -> str:
    facts = [platform.machine()]
    if (file := Path("/proc/cpuinfo")).is_file():
        lines = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        read = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        facts += [read.get(key, "") for key in ("model name", "cpu family", "model", "stepping")]
        facts.append(" ".join(sorted(read.get("flags", "").split())))
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    facts += [file.read_text().strip() for file in sorted(caches.glob("index*/size"))]
    return f"cpu {hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"
