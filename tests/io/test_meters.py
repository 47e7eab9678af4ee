"""What work takes of the machine."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedkd.io import meters
from fedkd.io.meters import Counter, Meter, graphics, peak_of, processors, ray_workers


def zone(root: Path, folder: str, name: str, microjoules: int) -> Path:
    """A power zone as Linux shows it."""
    place = root / folder
    place.mkdir()
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text("262143328850\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    return place / "energy_uj"


def test_a_counter_that_begins_anew_goes_on() -> None:
    values: Iterator[float] = iter([90.0, 95.0, 3.0, 4.0])
    counter = Counter(lambda: next(values), wraps=100.0)
    assert [counter.joules for _ in range(3)] == [5.0, 13.0, 14.0]


def test_packages_and_memory_count_once_and_their_parts_not(tmp_path: Path) -> None:
    files = [
        zone(tmp_path, folder, name, 5_000_000)
        for folder, name in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "psys"),
        )
    ]
    counters = processors(tmp_path)
    for file in files:
        file.write_text("7000000\n")
    assert [counter.joules for counter in counters] == [2.0, 2.0]
    files[0].unlink()  # what is no longer readable stops no training
    assert [counter.joules for counter in counters] == [2.0, 2.0]
    assert len(processors(tmp_path)) == 1
    assert processors(tmp_path / "nowhere") == []


class Nvml:
    """Two GPUs, of which the second counts no energy."""

    def __init__(self) -> None:
        self.spent = 1000

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0 if index.value < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, name: Any, handle: Any) -> int:
        handle._obj.value = 1
        return 0 if name.value == b"GPU-1" else 2

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, spent: Any) -> int:
        spent._obj.value = self.spent
        return 0 if handle.value == 1 else 3


@pytest.mark.parametrize(
    ("visible", "gpus"), [(None, 1), ("0", 1), ("1", 0), ("GPU-1", 1), ("", 0), ("7,MIG-a", 0)]
)
def test_the_gpus_that_may_be_used_are_counted(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int
) -> None:
    nvml = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    counters = graphics()
    nvml.spent = 4500  # millijoules
    assert [counter.joules for counter in counters] == [3.5] * gpus


def test_a_machine_that_counts_nothing_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "counters", lambda gpus: {})
    meter = Meter()
    meter.start()
    meter.stop()
    assert (meter.joules, meter.gpu_memory) == (None, None)
    values: Iterator[float] = iter([10.0, 11.0, 15.0])
    counted = {"RAPL": [Counter(lambda: next(values))]}
    monkeypatch.setattr(meters, "counters", lambda gpus: counted)
    meter = Meter()
    meter.start()
    meter.stop()
    assert meter.joules == 4.0


def test_memory_is_the_peak_of_the_work_and_not_of_what_came_before() -> None:
    if peak_of(os.getpid()) is None:
        pytest.skip("this system does not say how much memory a process had")

    def measured(size: int) -> int:
        meter = Meter(workers=True)  # there are none: this process works
        meter.start()
        bytearray(os.urandom(16)) * (size // 16)
        meter.stop()
        assert meter.memory is not None
        return meter.memory

    large, small = measured(200_000_000), measured(16)
    if small == large:
        pytest.skip("this system does not let a process forget its peak")
    assert large - small > 150_000_000


def test_workers_are_rays_below_this_process(tmp_path: Path) -> None:
    here = os.getpid()
    for process, parent, line in (
        (here, 1, b"python"),
        (here + 1, here, b"raylet"),
        (here + 2, here + 1, b"ray::ClientAppActor.run\0"),
        (here + 3, here + 1, b"python\0monitor.py"),
        (here + 4, 1, b"ray::IDLE"),  # somebody else's
    ):
        folder = tmp_path / str(process)
        folder.mkdir()
        (folder / "stat").write_text(f"{process} (a (name) here) S {parent} 1 1")
        (folder / "cmdline").write_bytes(line)
    assert ray_workers(tmp_path) == [here + 2]
    assert peak_of(here, tmp_path) is None
