"""What work takes of this machine: energy by its own counters, memory by the kernel's.

Energy: RAPL (`/sys/class/powercap`: processors and their memory; readable by root alone on many
machines) and NVML (GPUs). Both count everything that runs here. Memory: the largest process of
those that work, by Linux.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch

POWERCAP, PROC = Path("/sys/class/powercap"), Path("/proc")
# RAPL's counters begin anew after some 262 kJ, which is minutes on a large machine.
_LOOK_EVERY = 30.0


class Counter:
    """Joules by a counter that begins anew at its largest value.

    Args:
        read: Gives the counter, in joules.
        wraps: Its largest value; 0: it does not begin anew.
    """

    def __init__(self, read: Callable[[], float], wraps: float = 0.0) -> None:
        self._read, self._wraps = read, wraps
        self._last, self._total = read(), 0.0
        self._lock = threading.Lock()

    @property
    def joules(self) -> float:
        """Since it was made."""
        with self._lock:
            try:
                now = self._read()
            except OSError:  # no reason to stop a training
                return self._total
            self._total += now - self._last + (self._wraps if now < self._last else 0.0)
            self._last = now
            return self._total


def processors(root: Path = POWERCAP) -> list[Counter]:
    """RAPL's counters of processors and memory, as far as they may be read."""
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            # Cores and GPU are parts of a package, `psys` holds all packages.
            name = (zone / "name").read_text(encoding="ascii").strip()
            if name.startswith("package") or name == "dram":
                wraps = _joules_in(zone / "max_energy_range_uj")
                found.append(Counter(partial(_joules_in, zone / "energy_uj"), wraps))
        except (OSError, ValueError):
            continue
    return found


def _joules_in(file: Path) -> float:
    return int(file.read_text(encoding="ascii")) / 1e6


def graphics() -> list[Counter]:
    """NVML's counters of the GPUs that this process may use; none where there is no NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return []
    except (OSError, AttributeError):
        return []
    return [
        counter for handle in _handles(nvml) if (counter := _energy_of(nvml, handle)) is not None
    ]


def _handles(nvml: ctypes.CDLL) -> list[ctypes.c_void_p]:
    """Of the devices in CUDA_VISIBLE_DEVICES; of all, where it is not set."""
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(count.value)] if visible is None else visible.split(",")
    found = []
    for name in map(str.strip, names):
        handle = ctypes.c_void_p()
        by_number = name.isdecimal()
        get = nvml.nvmlDeviceGetHandleByIndex_v2 if by_number else nvml.nvmlDeviceGetHandleByUUID
        key = ctypes.c_uint(int(name)) if by_number else ctypes.c_char_p(name.encode())
        if name and get(key, ctypes.byref(handle)) == 0:
            found.append(handle)
    return found


def _energy_of(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> Counter | None:
    spent = ctypes.c_ulonglong()

    def read() -> float:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(spent)) != 0:
            raise OSError("NVML counts no energy of this GPU")
        return spent.value / 1e3

    try:
        return Counter(read)
    except OSError:
        return None


@cache
def counters(gpus: bool) -> Mapping[str, list[Counter]]:
    """Source -> its counters, made once; without `gpus` those of the processors alone."""
    found = {"RAPL": processors(), "NVML": graphics() if gpus else []}
    found = {source: those for source, those in found.items() if those}
    if found:
        threading.Thread(target=_look, args=(found.values(),), daemon=True).start()
    return found


def _look(counted: Collection[list[Counter]]) -> None:
    while True:
        time.sleep(_LOOK_EVERY)
        _joules(counted)


def _joules(counted: Collection[list[Counter]]) -> float:
    return sum(counter.joules for those in counted for counter in those)


class Meter:
    """What a piece of work takes, from its start to its stop; one at a time.

    Args:
        gpus: Whether GPUs work too.
        workers: Whether Ray's workers do the work, where there are any.

    Attributes:
        seconds: Duration.
        joules: Of the machine in that time; None where nothing counts them.
        memory: Bytes of the largest process that worked, at its peak; None where it is not known.
        gpu_memory: Bytes of tensors on this process's GPU, at their peak; None without one.
    """

    def __init__(self, *, gpus: bool = False, workers: bool = False) -> None:
        self._counters = counters(gpus).values()
        self._workers = workers
        self.seconds = 0.0
        self.joules: float | None = None
        self.memory: int | None = None
        self.gpu_memory: int | None = None

    def start(self) -> None:
        """The work begins."""
        for process in self._processes():
            _forget_peak(process)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._before = _joules(self._counters)
        self._since = time.perf_counter()

    def stop(self) -> None:
        """The work is over."""
        self.seconds = time.perf_counter() - self._since
        if self._counters:
            self.joules = _joules(self._counters) - self._before
        peaks = [peak for process in self._processes() if (peak := peak_of(process)) is not None]
        self.memory = max(peaks, default=None)
        if torch.cuda.is_initialized():
            self.gpu_memory = torch.cuda.max_memory_allocated()

    def _processes(self) -> list[int]:
        return (self._workers and ray_workers()) or [os.getpid()]


def peak_of(process: int, root: Path = PROC) -> int | None:
    """The most memory (bytes, resident) that a process had; None where Linux does not say."""
    try:
        with (root / str(process) / "status").open(encoding="utf-8", errors="replace") as lines:
            return next(
                (int(line.split()[1]) * 1024 for line in lines if line[:6] == "VmHWM:"), None
            )
    except (OSError, ValueError):
        return None


def _forget_peak(process: int) -> None:
    # What a process had before is not this work's; where that is refused, it is counted too.
    with suppress(OSError):
        (PROC / str(process) / "clear_refs").write_text("5", encoding="ascii")


def ray_workers(root: Path = PROC) -> list[int]:
    """Ray's workers that this process has started, also by way of others."""
    parents: dict[int, int] = {}
    for folder in root.glob("[0-9]*"):
        try:
            # The name, in brackets, may hold anything.
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
        except (OSError, ValueError, IndexError):
            continue
    found = []
    for process in parents:
        above = process
        while above := parents.get(above, 0):
            if above == os.getpid():
                break
        else:
            continue
        try:
            if (root / str(process) / "cmdline").read_bytes().startswith(b"ray::"):
                found.append(process)
        except OSError:
            continue
    return sorted(found)
